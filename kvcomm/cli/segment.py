"""`kvcomm segment`: texts under names, tokenized once, for `kvcomm context create --segment`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvcomm.cli import remote_segments
from kvcomm.cli.options import (
    DEFAULT_MODEL,
    FileFlag,
    ModelFlag,
    PlaceOptions,
    TextFlag,
    WriteOptions,
    load_engine,
    read_text,
)
from kvcomm.cli.output import JsonFlag, emit, table
from kvcomm.cli.spread import spread
from kvcomm.cli.text import age_of, counted, printable
from kvcomm.errors import EmptyPrompt, InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from kvcomm.cli.store import SegmentEntry, StoredSegment

app = typer.Typer(
    help="Keep texts under names, to be used in any context: role prompts, tool schemas, documents.",
    no_args_is_help=True,
    epilog="Segments lie beside the contexts: --dir, $KVCOMM_HOME, or `contexts` in the user's cache folder.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A segment; `kvcomm segment ls` shows them.")]


@app.command("add", epilog="Example: kvcomm segment add tools --file tools.json")
@spread
def add_command(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the new segment.")],
    text: TextFlag = None,
    file: FileFlag = None,
    model: ModelFlag = DEFAULT_MODEL,
    kept: WriteOptions,
) -> None:
    """Tokenize a text (--text or --file) with the model's tokenizer and keep it.

    A server (--server) uses its own model, and makes the text the name's next version.
    """
    from kvcomm.cli.store import Store, StoredSegment

    if (text is None) == (file is None):
        raise InvalidRequest("give either --text or --file")
    if kept.server is not None:
        remote_segments.add(kept.server, kept.key, name, _content(text, file), as_json=kept.as_json)
        return
    store = Store(kept.folder)
    store.require_new_segment(name, force=kept.force)
    content = _content(text, file)
    with load_engine(model) as engine:
        segment, namespace = engine.segment(content), engine.namespace()
    if not segment.token_ids:
        raise EmptyPrompt(f"the text of segment {name!r} has no tokens")
    stored = StoredSegment(
        namespace=namespace,
        model=model,
        digest=segment.digest(namespace),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        text=content,
        token_ids=segment.token_ids,
    )
    path = store.write_segment(name, stored, force=kept.force)
    line = f"added {name}: {counted(len(stored.token_ids), 'token')}, {stored.digest[:12]}"
    emit({"name": name, "file": str(path), **_facts(stored)}, line, as_json=kept.as_json)


@app.command("ls")
@spread
def list_command(kept: PlaceOptions, as_json: JsonFlag = False) -> None:
    """Show every segment."""
    from kvcomm.cli.store import Store

    if kept.server is not None:
        remote_segments.show_all(kept.server, kept.key, as_json=as_json)
        return
    store = Store(kept.folder)
    entries = store.segments()
    value = {"folder": str(store.folder), "segments": [_values(entry) for entry in entries]}
    emit(value, _view(entries) if entries else Text(f"no segments in {store.folder}"), as_json=as_json)


@app.command("show", epilog="Example: kvcomm segment show tools")
@spread
def show_command(
    name: Name,
    kept: PlaceOptions,
    as_json: JsonFlag = False,
) -> None:
    """Show a segment and its text."""
    from kvcomm.cli.store import Store

    if kept.server is not None:
        remote_segments.show(kept.server, kept.key, name, as_json=as_json)
        return
    stored = Store(kept.folder).segment(name)
    value = {"name": name, **_facts(stored), "text": stored.text, "token_ids": list(stored.token_ids)}
    rows = [(key.replace("_", " "), printable(str(fact))) for key, fact in _facts(stored).items()]
    emit(value, table(None, rows, title=name), as_json=as_json)
    if not as_json:
        sys.stdout.write(f"\n{printable(stored.text)}\n")


@app.command("rm", epilog="Example: kvcomm segment rm tools")
@spread
def remove_command(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The segments to remove.")],
    kept: PlaceOptions,
    as_json: JsonFlag = False,
) -> None:
    """Remove segments, whatever state their files are in; contexts made with them stay."""
    from kvcomm.cli.entries import emit_removed
    from kvcomm.cli.store import Store

    if kept.server is not None:
        remote_segments.remove(kept.server, kept.key, names, as_json=as_json)
        return
    store = Store(kept.folder)
    for name in names:
        store.require_segment(name)  # all names are known before the first is removed
    emit_removed("name", [(name, store.remove_segment(name)) for name in names], as_json=as_json)


def _content(text: str | None, file: Path | None) -> str:
    if file is not None:
        return read_text(file)
    assert text is not None
    return text


def _facts(stored: StoredSegment) -> dict[str, Any]:
    return {
        "num_tokens": len(stored.token_ids),
        "digest": stored.digest,
        "model": stored.model,
        "namespace": stored.namespace,
        "created": stored.created,
    }


def _values(entry: SegmentEntry) -> dict[str, Any]:
    facts = _facts(entry.stored) if entry.stored else {}
    return {"name": entry.name, "file": str(entry.file), "refusal": entry.refusal, **facts}


def _view(entries: list[SegmentEntry]) -> RenderableType:
    from kvcomm.cli.entries import refused_note

    columns = ["name", "tokens", "digest", "model", "age"]
    any_refused = any(entry.refusal for entry in entries)
    if any_refused:
        columns.append("refused because")
    view = table(columns, [_row(entry)[: len(columns)] for entry in entries], numeric={"tokens"})
    return Group(view, refused_note("kvcomm segment rm NAME")) if any_refused else view


def _row(entry: SegmentEntry) -> tuple[object, ...]:
    if (stored := entry.stored) is None:
        return (printable(entry.name), None, None, None, None, printable(entry.refusal or ""))
    age = age_of(stored.created)
    return (printable(entry.name), len(stored.token_ids), stored.digest[:12], printable(stored.model), age, None)
