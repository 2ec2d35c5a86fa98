"""What commands print: one JSON object with `--json`, else tables for people; results on stdout, errors on
stderr.

Numbers leave as numbers in JSON and formatted in tables; both come from the same value, so they never
disagree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kvcomm.figures import Figure

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

PIPE_WIDTH = 200
"""Columns where stdout is not a terminal, unless a table needs more: there none wraps."""


def emit(value: Any, *views: RenderableType, as_json: bool) -> None:
    """Print a result on stdout.

    Args:
        value: the result as JSON values.
        views: the same for people, printed one below the other with an empty line between.
        as_json: print `value`, not `views`.
    """
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else _pipe_width(views), highlight=False)
    for index, view in enumerate(views):
        if index:
            console.print()
        console.print(view)


def table(
    columns: Sequence[str] | None,
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    numeric: Collection[str] = (),
) -> Table:
    """A table of plain cells; `numeric` columns are aligned right, None is an empty cell, no columns no header."""
    view = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=columns is not None,
    )
    for column in columns or ():
        view.add_column(column, justify="right" if column in numeric else "left", header_style="dim")
    for row in rows:
        view.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return view


def figure_table(title: str, figures: Iterable[Figure]) -> Table:
    """Figures of a benchmark for people."""
    rows = [
        (figure.id, _number(figure.value), figure.unit, " .. ".join(map(_number, figure.spread or ())))
        for figure in figures
    ]
    return table(("figure", "median", "unit", "quartiles"), rows, title=title, numeric={"median"})


def _pipe_width(views: Iterable[RenderableType]) -> int:
    endless = Console(width=10**6)
    tables = (view for view in views if isinstance(view, Table))
    return max([PIPE_WIDTH, *(endless.measure(each).maximum for each in tables)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def format_bytes(num_bytes: int) -> str:
    """A size in the largest decimal unit that keeps it at or above 1."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def emit_error(kind: str, message: str, *, as_json: bool) -> None:
    """Print an error on stderr: one line `error: ...`, or one JSON object with its type and message."""
    line = " ".join(message.split())
    if as_json:
        sys.stderr.write(json.dumps({"error": {"type": kind, "message": line}}) + "\n")
    else:
        sys.stderr.write(f"error: {line}\n")
