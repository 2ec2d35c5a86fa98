"""Where `kvcomm context` finds contexts: one set of verbs for a folder of this machine and for a running server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import typer
from rich.console import RenderableType

from kvcomm.cli.options import FileFlag, TextFlag

SegmentFlag = Annotated[
    list[str] | None,
    typer.Option("--segment", metavar="SEGMENT", help="A stored segment; may be repeated, in the order of the prompt."),
]
Show = Callable[[str], None]
"""Is given the pieces of an answer as they come."""


@dataclass(frozen=True)
class Given:
    """Options of what is put into a context: stored segments, then a file's text, then the text itself."""

    text: TextFlag = None
    file: FileFlag = None
    segments: SegmentFlag = None


class Told(NamedTuple):
    """What a verb tells.

    Attributes:
        value: for machines.
        views: for people.
        aside: one line beside what they asked for.
    """

    value: dict[str, Any]
    views: tuple[RenderableType, ...]
    aside: str = ""


class ContextPlace(Protocol):
    """Contexts that are called by names. Methods raise KVCommError for a name that is not there, or taken already."""

    def create(self, name: str, given: Given, parent: str | None) -> Told:
        """A context of what is given, behind a parent if there is one."""
        ...

    def fork(self, name: str, new: str) -> Told:
        """A second context with the same past."""
        ...

    def extend(self, name: str, given: Given, save_as: str | None) -> Told:
        """Further text behind a context, or behind a fork of it."""
        ...

    def generate(
        self, name: str, sampling: Mapping[str, Any], stop: Sequence[str], save_as: str | None, show: Show
    ) -> Told:
        """An answer behind a context; with `save_as` a fork of it keeps the answer."""
        ...

    def all(self) -> Told:
        """Every context."""
        ...

    def relatives(self, name: str | None) -> Told:
        """All contexts as trees, or one with what it came from and what came from it."""
        ...

    def remove(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Remove contexts; what came from them stays. Returns names and the bytes that each of them freed."""
        ...
