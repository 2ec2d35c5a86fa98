"""`kvcomm context`: contexts under names, kept as snapshots between calls."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvcomm.cli.context_place import ContextPlace, Given, Told
from kvcomm.cli.options import DEFAULT_MODEL, ModelFlag, PlaceOptions, SamplingOptions, WriteOptions
from kvcomm.cli.output import JsonFlag, emit
from kvcomm.cli.spread import spread
from kvcomm.cli.text import printable

app = typer.Typer(
    help="Keep the KV cache of prompts under names: create, fork, extend, generate, show.",
    no_args_is_help=True,
    epilog="Contexts are snapshot files in one folder: --dir, $KVCOMM_HOME, or `contexts` in the user's cache folder.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A context; `kvcomm context ls` shows them.")]
NewName = Annotated[str, typer.Argument(metavar="NEW", help="The name of the new context.")]
ParentFlag = Annotated[
    str | None, typer.Option("--extend-from", metavar="CONTEXT", help="Begin with the KV of this context.")
]
SaveAsFlag = Annotated[
    str | None, typer.Option("--save-as", metavar="NAME", help="Keep the result under this name.", show_default=False)
]
StopFlag = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="A string that ends the answer.")]


@app.command("create", epilog='Example: kvcomm context create base --segment tools --text "You are a careful agent."')
@spread
def create_command(
    *,
    name: NewName,
    given: Given,
    extend_from: ParentFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    kept: WriteOptions,
) -> None:
    """Compute a prompt once and keep its KV.

    Stored segments come first, then --file, then --text.
    """
    place = _place(kept, model=model, force=kept.force)
    _emit(place.create(name, given, extend_from), as_json=kept.as_json)


@app.command("fork", epilog="Example: kvcomm context fork base left")
@spread
def fork_command(
    name: Name,
    new: NewName,
    kept: WriteOptions,
) -> None:
    """Give a context a second name from which it can go another way; no bytes are copied."""
    _emit(_place(kept, force=kept.force).fork(name, new), as_json=kept.as_json)


@app.command("extend", epilog='Example: kvcomm context extend left --text "Try algebra."')
@spread
def extend_command(
    *,
    name: Name,
    given: Given,
    save_as: SaveAsFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    kept: WriteOptions,
) -> None:
    """Add text to the end of a context and compute its KV.

    Replaces the context, unless --save-as names another one; forks of it stay as they are.
    """
    place = _place(kept, model=model, force=kept.force)
    _emit(place.extend(name, given, save_as), as_json=kept.as_json)


@app.command("generate", epilog="Example: kvcomm context generate left --max-new-tokens 64 --save-as left-1")
@spread
def generate_command(
    *,
    name: Name,
    sampling: SamplingOptions,
    stop: StopFlag = None,
    save_as: SaveAsFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    kept: WriteOptions,
) -> None:
    """Generate an answer to what a context holds.

    The stored context stays as it is; --save-as keeps another one that ends with the answer.
    """
    place, show = _place(kept, model=model, force=kept.force), _shown_nowhere if kept.as_json else _shown
    told = place.generate(name, sampling.settings, tuple(stop or ()), save_as, show)
    _emit(told, as_json=kept.as_json)


@app.command("ls")
@spread
def list_command(kept: PlaceOptions, as_json: JsonFlag = False) -> None:
    """Show every context."""
    _emit(_place(kept).all(), as_json=as_json)


@app.command("show", epilog="Example: kvcomm context show base")
@spread
def show_command(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this context, what it continues and what continues it.")
    ] = None,
    kept: PlaceOptions,
    as_json: JsonFlag = False,
) -> None:
    """Show the contexts as a tree: what they have in common stands there once."""
    _emit(_place(kept).relatives(name), as_json=as_json)


@app.command("rm", epilog="Example: kvcomm context rm left right")
@spread
def remove_command(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The contexts to remove.")],
    kept: PlaceOptions,
    as_json: JsonFlag = False,
) -> None:
    """Remove contexts, whatever state their files are in; forks keep what they share."""
    from kvcomm.cli.entries import emit_removed

    emit_removed("name", _place(kept).remove(names), as_json=as_json)


def _place(kept: PlaceOptions, *, model: str = DEFAULT_MODEL, force: bool = False) -> ContextPlace:
    """Where contexts are: on a server, or in a folder."""
    if kept.server is not None:
        from kvcomm.cli.remote_context import RemoteContexts

        return RemoteContexts(kept.server, kept.key)
    from kvcomm.cli.local_context import LocalContexts

    return LocalContexts(kept.folder, model, force=force)


def _emit(told: Told, *, as_json: bool) -> None:
    emit(told.value, *told.views, as_json=as_json)
    if told.aside and not as_json:
        sys.stderr.write(told.aside + "\n")


def _shown(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _shown_nowhere(text: str) -> None:
    """For those who get all of it at the end."""
