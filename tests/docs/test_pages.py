"""What pages say about this repository: files that they name are there, and links outside the site lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.snippets import PAGES, ROOT

NAMED = re.compile(
    r"`((?:kvcomm|eval|tests|scripts|examples|anchors|docs|\.github)/[\w./-]+|[A-Z]+\.md|pyproject\.toml|constraints\.txt)`"
)
LINKED = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
EXAMPLES = ("anchors/smollm2-135m/",)
"""What tuning writes is named before it is there."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    named = {name for name in NAMED.findall(page.read_text()) if not name.startswith(EXAMPLES)}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_linked_are_there(page: Path) -> None:
    assert not [link for link in LINKED.findall(page.read_text()) if not (page.parent / link).exists()]


def test_the_first_page_leads_to_every_other_one() -> None:
    """As README says."""
    docs = ROOT / "docs"
    linked = set(LINKED.findall((docs / "index.md").read_text()))
    assert {page.name for page in docs.glob("*.md")} - linked == {"index.md"}
