"""What `kvcomm doctor --families` tries and shows: the table of supported families, on a terminal and in a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from kvcomm.cli.output import table
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.lab.families import FamilyRow

BEGIN, END = "<!-- families: written by `kvcomm doctor --families --page` -->", "<!-- end of families -->"
COLUMNS = ("family", "model", "outcome", "attention", "reason")


def tried_families() -> list[dict[str, Any]]:
    """One row for each family of transformers, as JSON values; progress goes to stderr."""
    from dataclasses import asdict

    from kvcomm.lab.families import try_family
    from kvcomm.model.families import families
    from kvcomm.model.progress import Reporter

    names = list(families())
    rows: list[FamilyRow] = []
    with Reporter(enabled=True).stage(f"trying {len(names)} families of models", total=len(names)) as update:
        for name in names:
            rows.append(try_family(name))
            update(len(rows))
    return [asdict(row) for row in rows]


def families_view(rows: list[dict[str, Any]]) -> RenderableType:
    """The table for people."""
    return table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows], title=f"Families: {summary(rows)}")


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """How many families have which outcome, in words."""
    counts = Counter(str(row["outcome"]) for row in rows)
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a Markdown page.

    Raises:
        InvalidRequest: there is no such page, or it has not both marks.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{page} cannot be read ({error.strerror})") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidRequest(f"{page} has no place for the table: a line {BEGIN} and, below it, a line {END}")
    page.write_text(f"{before}{BEGIN}\n\n{markdown(rows)}\n{END}{after}", encoding="utf-8")


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The table as Markdown, a summary above it."""
    listed = list(rows)
    lines = [f"{summary(listed)}.", "", _line(COLUMNS), _line("---" for _ in COLUMNS)]
    lines += [_line(str(row[column]) for column in COLUMNS) for row in listed]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
