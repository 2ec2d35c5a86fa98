"""Snippets of README.md and docs/*.md: found by a parser of Markdown, told by language, named by page and line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = frozenset({"python", "bash", "json", "toml", "text"})
"""What a fence may say. A `text` block is nothing to run: a picture, or what a program prints."""


class Snippet(NamedTuple):
    """A fenced block; `line` is that of its first line within the page, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Page and line, as editors and tracebacks write them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """One command of a shell block, continued lines joined; `words` without its comment."""

    place: str
    text: str
    words: tuple[str, ...]


def snippets(page: Path) -> Iterator[Snippet]:
    """Every code block of a page in order; one that is only indented has no language."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            line = token.map[0] + (2 if token.type == "fence" else 1)
            yield Snippet(page, line, token.info.strip(), token.content)


def python_of(page: Path) -> list[Snippet]:
    """The Python blocks of a page, which share one namespace as they do for whoever pastes them."""
    return [each for each in snippets(page) if each.language == "python"]


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in order."""
    return [command for each in snippets(page) if each.language == "bash" for command in commands_in(each)]


def commands_in(snippet: Snippet) -> Iterator[Command]:
    """The commands of one shell block, in order."""
    text, line = "", snippet.line
    for number, part in enumerate(snippet.text.splitlines(), start=snippet.line):
        line = line if text else number
        text += part
        if text.endswith("\\"):
            text = text[:-1].rstrip() + " "
            continue
        try:
            words = tuple(shlex.split(text, comments=True))
        except ValueError:  # a quotation goes on
            text += "\n"
            continue
        if words:
            yield Command(f"{snippet.page.relative_to(ROOT)}:{line}", text, words)
        text = ""
    assert not text, f"{snippet.place}: a quotation has no end"
