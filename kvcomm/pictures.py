"""Results as pictures, for notebooks: plain HTML without scripts, everything that users wrote escaped.

Colours never stand alone: every part of a bar is named with its number beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

COLOURS = {"exact": "#2f9e6e", "moved": "#e0a526", "computed": "#8d97a5"}
"""By where the KV of a token came from."""

BAR_STYLE = "display:inline-flex;width:{width}px;height:12px;border-radius:3px;overflow:hidden;vertical-align:middle"
CELL_STYLE = "text-align:left;padding:2px 10px 2px 0;vertical-align:top"
MAX_TEXT = 240
"""Characters of a text in a picture."""


class TokenSources(NamedTuple):
    """How many tokens of a prompt came from where."""

    exact: int
    moved: int
    computed: int


def bar(sources: TokenSources, width: int = 240) -> str:
    """One bar, and behind it the numbers by name."""
    total = max(1, sum(sources))
    parts = "".join(
        f'<span title="{name}: {number}" style="background:{COLOURS[name]};width:{100 * number / total:.2f}%"></span>'
        for name, number in sources._asdict().items()
        if number
    )
    told = ", ".join(f"{number:,} {name}" for name, number in sources._asdict().items() if number) or "nothing"
    return f'<span style="{BAR_STYLE.format(width=width)}">{parts}</span> <small>{told}</small>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    names = "".join(f'<th style="{CELL_STYLE}">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f'<td style="{CELL_STYLE}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def shown(text: str) -> str:
    """A text as HTML, cut where it is long."""
    cut = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."
    return escape(cut).replace("\n", "<br>")


Path = tuple[str, ...]
"""Names of the pieces that something is made of, in order."""


def tree(paths: Sequence[tuple[Path, str]]) -> str:
    """Nested lists: what paths begin with alike stands there once.

    Args:
        paths: and what is said at the end of each; both are escaped.
    """
    return _list(paths, 0) if paths else "<small>none</small>"


def _list(paths: Sequence[tuple[Path, str]], depth: int) -> str:
    items = [
        f"<li>{escape(name)}{_told(below, depth)}{_list(below, depth + 1)}</li>" for name, below in _alike(paths, depth)
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _alike(paths: Sequence[tuple[Path, str]], depth: int) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """The pieces at a depth, in the order in which they come first, and the paths that go through each."""
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path, told in paths:
        if len(path) > depth:
            groups.setdefault(path[depth], []).append((path, told))
    return iter(groups.items())


def _told(paths: Sequence[tuple[Path, str]], depth: int) -> str:
    ends = [told for path, told in paths if len(path) == depth + 1 and told]
    return "".join(f" <small><b>{escape(told)}</b></small>" for told in ends)
