"""Snapshot files as rows: facts from their headers, or why they are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kvcomm.cli.output import emit, format_bytes, table
from kvcomm.cli.store import ContextEntry
from kvcomm.cli.text import age_of, printable


def entry_values(entry: ContextEntry) -> dict[str, Any]:
    """A context file as JSON values."""
    value: dict[str, Any] = {
        "name": entry.name,
        "file": str(entry.file),
        "num_bytes": entry.num_bytes,
        "num_links": entry.num_links,
        "refusal": entry.refusal,
    }
    if (header := entry.header) is not None:
        value |= header.model_dump(mode="json", include={"namespace", "architecture", "dtype", "fidelity", "created"})
        value["num_tokens"] = len(header.token_ids)
        value["path"] = [step.model_dump() for step in header.path]
    return value


def entries_table(
    first: str, entries: Sequence[ContextEntry], *, title: str | None = None, removal: str = ""
) -> RenderableType:
    """Context files for people.

    Args:
        first: names the column with their names.
        removal: the command that removes a refused one, shown if there is one.
    """
    columns = [first, "tokens", "steps", "fidelity", "model", "size", "age"]
    if any(entry.refusal for entry in entries):
        columns.append("refused because")
    rows = [_entry_row(entry)[: len(columns)] for entry in entries]
    view = table(columns, rows, title=title, numeric={"tokens", "steps", "size"})
    return Group(view, refused_note(removal)) if removal and "refused because" in columns else view


def refused_note(removal: str) -> Text:
    """What to do about refused files."""
    return Text(f"A refused file is never used. Remove it with `{removal}`.", style="dim")


def emit_removed(key: str, removed: Sequence[tuple[str, int]], *, as_json: bool) -> None:
    """Print what was removed and the bytes that freed; `key` is what the things are called in JSON."""
    value = {"removed": [{key: name, "freed_bytes": freed_bytes} for name, freed_bytes in removed]}
    lines = [f"removed {name}, {format_bytes(freed_bytes)} freed" for name, freed_bytes in removed]
    emit(value, Text("\n".join(lines)), as_json=as_json)


def _entry_row(entry: ContextEntry) -> tuple[object, ...]:
    size, name = format_bytes(entry.num_bytes), printable(entry.name)
    if (header := entry.header) is None:
        return (name, None, None, None, None, size, None, printable(entry.refusal or ""))
    dtype = header.dtype.removeprefix("torch.")
    model = printable(f"{header.architecture} {dtype} {header.namespace[:8]}")
    steps = len(header.path)
    return (name, len(header.token_ids), steps, header.fidelity, model, size, age_of(header.created), None)
