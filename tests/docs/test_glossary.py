"""The glossary: every word stands there once, and what it names is where it says."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs.snippets import ROOT

NAMED = re.compile(r"`([\w.]+)` in `(\w+)`")


def rows() -> Iterator[tuple[str, str]]:
    """Word and place of each row."""
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| word |"):
            word, meaning, _, place = (cell.strip() for cell in line.strip("|").split("|"))
            assert meaning, line
            yield word, place


@cache
def names_in(folder: str) -> frozenset[str]:
    """What modules below a folder of kvcomm define, and `Class.member` for members of classes."""
    found = set[str]()
    for file in (ROOT / "kvcomm" / folder).rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            found |= {*_names(node)}
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for member in ast.walk(node) for name in _names(member)}
    return frozenset(found)


def _names(node: ast.AST) -> Iterator[str]:
    """What a statement gives a name to; attributes that a method sets count."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id
        elif isinstance(target, ast.Attribute):
            yield target.attr


def test_every_word_stands_there_once() -> None:
    counts = Counter(word for word, _ in rows())
    assert len(counts) > 50
    assert [word for word, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("word", "place"), [*rows()], ids=[word for word, _ in rows()])
def test_what_a_word_names_is_there(word: str, place: str) -> None:
    named = NAMED.findall(place)
    assert ", ".join(f"`{name}` in `{folder}`" for name, folder in named) == place, word
    assert [name for name, folder in named if name not in names_in(folder)] == []
