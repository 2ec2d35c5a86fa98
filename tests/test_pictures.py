"""Results as pictures: what is shown adds up, is well-formed, and nothing that users wrote becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.agents.results import AgentResult, GroupResult
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Choice, Completion, Usage
from kvcomm.pictures import COLOURS, TokenSources, bar, shown, tree
from tests.tiny import TinyModel

HOSTILE = "<script>alert(1)</script>&\"'<b>"
VOID = {"br"}


class Page(HTMLParser):
    """Tags that are open, those seen, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.styles += [value or "" for name, value in attrs if name == "style"]
        assert {name for name, _ in attrs} <= {"style", "title"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def usage(exact: int, moved: int, computed: int) -> Usage:
    return Usage(exact + moved + computed, exact, moved, computed, 7, 0.0, 0.5, 1.5)


@given(st.tuples(*[st.integers(0, 10**6)] * 3))
def test_parts_of_a_bar_add_up(numbers: tuple[int, int, int]) -> None:
    page = Page(bar(TokenSources(*numbers)))
    widths = {
        name: float(style.split("width:")[1].rstrip("%"))
        for style in page.styles
        for name, colour in COLOURS.items()
        if colour in style
    }
    total = sum(numbers)
    expected = {name: 100 * number / total for name, number in TokenSources(*numbers)._asdict().items() if number}
    assert widths == pytest.approx(expected, abs=0.01)
    assert all(f"{number:,} {name}" in page.text for name, number in TokenSources(*numbers)._asdict().items() if number)


def test_what_users_wrote_is_text() -> None:
    choice = Choice(0, HOSTILE, (1,), "stop", None)
    answer = AgentResult(HOSTILE, 1, HOSTILE, (1,), (), usage(1, 2, 3), "stop", 0.0, 1.0)
    group = GroupResult(({"a": answer},), ("a",), 1.0)
    for html in (
        Completion((choice,), usage(1, 2, 3))._repr_html_(),
        group._repr_html_(),
        tree([((HOSTILE,), HOSTILE)]),
    ):
        page = Page(html)
        assert "script" not in page.tags
        assert HOSTILE in page.text


def test_a_long_text_is_cut() -> None:
    assert len(Page(shown("x" * 5000)).text) < 300


def test_what_paths_have_in_common_stands_there_once() -> None:
    page = Page(tree([(("system", "left"), "a context"), (("system", "right"), "another"), (("system",), "the base")]))
    assert page.tags.count("li") == 3
    assert page.text.count("system") == 1
    assert page.text.index("the base") < page.text.index("left") < page.text.index("right")
    assert Page(tree([])).text == "none"


def test_contexts_of_an_engine_are_a_tree(tiny: TinyModel) -> None:
    with (
        Engine(tiny.model, tiny.tokenizer) as engine,
        engine.context("The quick brown fox") as base,
        base.fork(name="left") as left,
    ):
        left.extend(" jumps")
        page = Page(engine.contexts._repr_html_())
        assert page.tags.count("li") == 2
        assert page.text.count("The quick") == 1
        assert "left" in page.text
        assert engine.contexts == (base, left)
