"""`kvcomm context`: contexts under names, kept as snapshots between calls."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvcomm.cli.options import (
    DEFAULT_MODEL,
    FileFlag,
    FolderFlag,
    ForceFlag,
    MaxNewTokensFlag,
    ModelFlag,
    SeedFlag,
    TemperatureFlag,
    TextFlag,
    load_engine,
    sampling_settings,
)
from kvcomm.cli.output import JsonFlag, emit, format_bytes
from kvcomm.cli.remote import KeyFlag, OptionalServerFlag
from kvcomm.cli.remote_context import (
    RemoteContexts,
    emit_answer,
    emit_context,
    emit_contexts,
    emit_tree,
    texts_of,
)
from kvcomm.cli.text import counted, printable, usage_line, usage_values

if TYPE_CHECKING:
    from kvcomm.cli.store import ContextEntry, Store
    from kvcomm.engine.context import Context
    from kvcomm.engine.engine import Engine

app = typer.Typer(
    help="Keep the KV of prompts under names: create, fork, extend, generate, show.",
    no_args_is_help=True,
    epilog="Contexts are snapshot files in one folder: --dir, $KVCOMM_HOME, or `contexts` in the user's cache folder.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A context; `kvcomm context ls` shows them.")]
NewName = Annotated[str, typer.Argument(metavar="NEW", help="The name of the new context.")]
SegmentFlag = Annotated[
    list[str] | None,
    typer.Option("--segment", metavar="SEGMENT", help="A stored segment; may be repeated, in the order of the prompt."),
]
ParentFlag = Annotated[
    str | None, typer.Option("--extend-from", metavar="CONTEXT", help="Begin with the KV of this context.")
]
SaveAsFlag = Annotated[
    str | None, typer.Option("--save-as", metavar="NAME", help="Keep the result under this name.", show_default=False)
]
StopFlag = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="A string that ends the answer.")]


@app.command("create", epilog='Example: kvcomm context create base --segment tools --text "You are a careful agent."')
def create_command(
    name: NewName,
    text: TextFlag = None,
    file: FileFlag = None,
    segment: SegmentFlag = None,
    extend_from: ParentFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute a prompt once and keep its KV.

    Stored segments come first, then --file, then --text.
    """
    if server is not None:
        remote = RemoteContexts(server, key)
        made = remote.create(name, texts_of(text, file, segment), extend_from)
        emit_context("created", made, as_json=as_json)
        return
    from kvcomm.cli.sources import Sources
    from kvcomm.cli.store import Store

    store = Store(folder)
    target = store.new_context(name, force=force)
    sources = Sources(store, segment, file, text)
    parent = store.usable_context(extend_from) if extend_from else None
    with load_engine(model) as engine:
        began_s = time.monotonic()
        segments = sources.read(engine)
        with _restore(engine, parent) if parent else engine.context(segments) as context:
            if parent:
                context.extend(segments)
            elapsed_s = time.monotonic() - began_s
            with store.taking(name):
                value = _save(context, name, target, replace=force, elapsed_s=elapsed_s)
    emit(value, Text(_saved_line("created", value)), as_json=as_json)


@app.command("fork", epilog="Example: kvcomm context fork base left")
def fork_command(
    name: Name,
    new: NewName,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Give a context a second name from which it can go another way; no bytes are copied."""
    if server is not None:
        emit_context("forked", RemoteContexts(server, key).fork(name, new), as_json=as_json)
        return
    from kvcomm.cli.store import Store

    store = Store(folder)
    copied_bytes = store.fork_context(name, new, force=force)
    value = {"name": new, "forked_from": name, "copied_bytes": copied_bytes, "file": str(store.context(new).file)}
    emit(value, f"forked {name} as {new}, {format_bytes(copied_bytes)} copied", as_json=as_json)


@app.command("extend", epilog='Example: kvcomm context extend left --text "Try algebra."')
def extend_command(
    name: Name,
    text: TextFlag = None,
    file: FileFlag = None,
    segment: SegmentFlag = None,
    save_as: SaveAsFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute further text behind a context.

    Replaces the context, unless --save-as names another one; forks of it stay as they are.
    """
    if server is not None:
        emit_context(
            "extended",
            RemoteContexts(server, key).extend(name, texts_of(text, file, segment), save_as),
            as_json=as_json,
        )
        return
    from kvcomm.cli.sources import Sources
    from kvcomm.cli.store import Store

    store = Store(folder)
    entry = store.usable_context(name)
    target = store.new_context(save_as or name, force=force or not save_as)
    sources = Sources(store, segment, file, text)
    with load_engine(model) as engine, _restore(engine, entry) as context:
        began_s = time.monotonic()
        context.extend(sources.read(engine))
        elapsed_s = time.monotonic() - began_s
        with store.taking(save_as or name):
            value = _save(context, save_as or name, target, replace=force or not save_as, elapsed_s=elapsed_s)
    emit(value, Text(_saved_line("extended", value)), as_json=as_json)


@app.command("generate", epilog="Example: kvcomm context generate left --max-new-tokens 64 --save-as left-1")
def generate_command(
    name: Name,
    max_new_tokens: MaxNewTokensFlag = None,
    temperature: TemperatureFlag = None,
    seed: SeedFlag = None,
    stop: StopFlag = None,
    save_as: SaveAsFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    folder: FolderFlag = None,
    force: ForceFlag = False,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer behind a context.

    The stored context stays as it is; --save-as keeps another one that ends with the answer.
    """
    if server is not None:
        given = sampling_settings(max_new_tokens, temperature, seed)
        emit_answer(RemoteContexts(server, key).generate(name, given, stop, save_as), as_json=as_json)
        return
    from kvcomm.cli.store import Store
    from kvcomm.engine.sampling import SamplingParams

    store = Store(folder)
    entry = store.usable_context(name)
    target = store.new_context(save_as, force=force) if save_as else None
    settings: dict[str, Any] = sampling_settings(max_new_tokens, temperature, seed)
    sampling = SamplingParams(**settings, stop=tuple(stop or ()))
    with load_engine(model) as engine, _restore(engine, entry) as context:
        handle = context.submit(sampling)
        for chunk in handle:
            if not as_json:
                sys.stdout.write(printable(chunk.text))
                sys.stdout.flush()
        completion = handle.result()
        with store.taking(save_as or ""):
            saved = _save(context, save_as, target, replace=force) if save_as and target else None
    usage = completion.usage
    value: dict[str, Any] = {"name": name, "text": completion.text, "token_ids": list(completion.token_ids)}
    value |= {"finish_reason": completion.finish_reason, "usage": usage_values(usage), "saved": saved}
    emit(value, "", as_json=as_json)
    if not as_json:
        sys.stderr.write(usage_line(usage) + (f"; {_saved_line('kept as', saved)}" if saved else "") + "\n")


@app.command("ls")
def list_command(
    folder: FolderFlag = None,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Show every context."""
    if server is not None:
        emit_contexts(RemoteContexts(server, key).all(), as_json=as_json)
        return
    from kvcomm.cli.entries import entries_table, entry_values
    from kvcomm.cli.store import Store

    store = Store(folder)
    entries = store.contexts()
    value = {"folder": str(store.folder), "contexts": [entry_values(entry) for entry in entries]}
    view = entries_table("name", entries, removal="kvcomm context rm NAME") if entries else _nothing(store)
    emit(value, view, as_json=as_json)


@app.command("show", epilog="Example: kvcomm context show base")
def show_command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this context, what it continues and what continues it.")
    ] = None,
    folder: FolderFlag = None,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the contexts as a tree: what they have in common stands there once."""
    if server is not None:
        emit_tree(RemoteContexts(server, key).relatives(name), as_json=as_json)
        return
    from kvcomm.cli import context_tree
    from kvcomm.cli.entries import entries_table, entry_values
    from kvcomm.cli.store import Store

    store = Store(folder)
    entries = store.contexts()
    refused = [] if name else [entry for entry in entries if entry.header is None]
    if name:
        header = store.usable_context(name).header
        assert header is not None
        entries = list(context_tree.relatives(entries, header))
    roots = context_tree.build_trees(entries)
    value = {
        "folder": str(store.folder),
        "trees": [{"namespace": key, "children": context_tree.tree_values(root)} for key, root in roots.items()],
        "refused": [entry_values(entry) for entry in refused],
    }
    views: list[Any] = [context_tree.render_tree(root) for root in roots.values()]
    if refused:
        views.append(entries_table("name", refused, title="Refused", removal="kvcomm context rm NAME"))
    emit(value, *(views or [_nothing(store)]), as_json=as_json)


@app.command("rm", epilog="Example: kvcomm context rm left right")
def remove_command(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The contexts to remove.")],
    folder: FolderFlag = None,
    server: OptionalServerFlag = None,
    key: KeyFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove contexts, whatever state their files are in; forks keep what they share."""
    from kvcomm.cli.entries import emit_removed

    if server is not None:
        emit_removed("name", RemoteContexts(server, key).remove(names), as_json=as_json)
        return
    from kvcomm.cli.store import Store

    store = Store(folder)
    for name in names:
        store.context(name)  # all names are known before the first is removed
    emit_removed("name", [(name, store.remove_context(name)) for name in names], as_json=as_json)


def _nothing(store: Store) -> Text:
    return Text(f"no contexts in {store.folder}")


def _restore(engine: Engine, entry: ContextEntry) -> Context:
    from kvcomm.cli.store import way_out

    with way_out(entry.name):
        return engine.restore(entry.file)


def _save(context: Context, name: str, file: Path, *, replace: bool, elapsed_s: float | None = None) -> dict[str, Any]:
    context.name = name
    context.save(file, replace=replace)
    return {
        "name": name,
        "file": str(file),
        "num_tokens": context.num_tokens,
        "num_steps": len(context.segments),
        "num_bytes": file.stat().st_size,
        **({} if elapsed_s is None else {"elapsed_s": elapsed_s}),
    }


def _saved_line(verb: str, value: dict[str, Any]) -> str:
    elapsed = f" in {value['elapsed_s']:.2f} s" if "elapsed_s" in value else ""
    return (
        f"{verb} {value['name']}: {counted(value['num_tokens'], 'token')}, {counted(value['num_steps'], 'step')}, "
        f"{format_bytes(value['num_bytes'])}{elapsed}"
    )
