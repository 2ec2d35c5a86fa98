"""A report whose figures come with a grid: every case of a sweep, for people as a table and for machines as rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from eval.figures import PIPE_WIDTH, Report, format_number

Cell = float | str
Row = tuple[Cell, ...]


class Grid(NamedTuple):
    """Rows of the same columns, units in their names."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Columns and rows."""
        return {"columns": list(self.columns), "rows": [list(row) for row in self.rows]}

    def table(self) -> Table:
        """For people."""
        view = Table(box=None, pad_edge=False)
        for column in self.columns:
            view.add_column(column, justify="right", header_style="dim")
        for row in self.rows:
            view.add_row(*(cell if isinstance(cell, str) else format_number(cell) for cell in row))
        return view


@dataclass(frozen=True)
class GridReport(Report):
    """Figures and a grid, which is in the JSON object under "grid"."""

    grid: Grid = field(default_factory=lambda: Grid((), ()))

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**super().to_json(), "grid": self.grid.to_json()}

    def emit(self, *, as_json: bool) -> None:
        """Print on stdout: one JSON object, or the grid and then the figures."""
        if not as_json:
            console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
            console.print(self.grid.table(), "")
        super().emit(as_json=as_json)
