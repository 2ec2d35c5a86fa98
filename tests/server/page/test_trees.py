"""Trees of what is kept: order, sizes, words, by mouse, by keyboard, on a phone."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys as Key

from tests.limits import PATIENCE_S
from tests.server.browser import Browser
from tests.server.live import Live
from tests.server.page.conftest import XSS, node, send, tree_labels


def test_the_cache(page: Browser, live: Live) -> None:
    """Real nodes with the server's words, those first that hold most with what hangs below them."""

    def held(node: dict[str, Any]) -> int:
        own = 0 if node["kind"] in ("segment", "salt") else node["bytes"]
        return int(own) + sum(map(held, node["children"]))

    def expected(node: dict[str, Any], level: int) -> list[tuple[str, str]]:
        return [
            each
            for child in sorted(node["children"], key=held, reverse=True)
            for each in [(str(level), child["label"] or child["id"]), *expected(child, level + 1)]
        ]

    send(page, "how many apples are left?")
    send(page, "how many apples are there?")
    root = httpx2.get(f"{live.url}/v1/cache/tree", timeout=PATIENCE_S).json()["root"]
    assert any(child["children"] for child in root["children"])
    page.wait(lambda: tree_labels(page, "#tree") == expected(root, 1))


FOREST = (
    node("A", 40, node("B", 10, pinned=True), node("C", 30, kind="rendition", fidelity="approximate")),
    node("D", 20, node("E", 20, kind="rendition"), kind="segment", label=XSS),
)


@pytest.fixture
def forest(page: Browser) -> Browser:
    """A page that shows two trees of known sizes in place of an answer."""
    page.run("window.view = new TreeView(document.getElementById('trial-result'), 'known')")
    page.run("view.show(arguments[0].map(cacheNodes), 'and 7 more')", FOREST)
    return page


def test_sizes_and_words_of_a_tree(forest: Browser) -> None:
    place = "#trial-result"
    labels = [("1", "A"), ("2", "B"), ("2", "C"), ("1", XSS), ("2", "E")]
    assert tree_labels(forest, place) == labels
    assert forest.text(f"{place} [data-id=id-C] .note") == "approximate · 30 tokens, 30.0 kB · rendition · used 5 s ago"
    assert " · prefix · pinned · used 5 s ago" in forest.text(f"{place} [data-id=id-B] .note")
    assert forest.text(f"{place} > .empty") == "and 7 more"
    bars = {each: forest.one(f"{place} [data-id=id-{each}] > .node .bar").size["width"] for each in "AB"}
    assert bars["B"] / bars["A"] == pytest.approx(0.25, abs=0.05)
    whole = forest.one(f"{place} .icicle").size["width"]
    shares = [each.size["width"] / whole for each in forest.all(f"{place} .cell")]
    assert shares == pytest.approx([0.8, 0.1, 0.3, 0.2, 0.2], abs=0.02)  # a segment is as big as its renditions


def test_contexts(page: Browser, contexts: list[str], live: Live) -> None:
    top = httpx2.get(f"{live.url}/v1/contexts/{contexts[0]}", timeout=PATIENCE_S).json()
    assert tree_labels(page, "#contexts") == [("1", "top"), ("2", "left"), ("1", contexts[2])]
    notes = [page.text(f"#contexts [data-id='{each}'] .note") for each in contexts]
    assert notes[0].startswith(f"exact · {top['tokens']} tokens, ")
    assert notes[0].endswith(" · pinned")
    assert " · 0 of its own · expires in " in notes[1]


def test_a_context_without_its_parent_stands_by_itself(page: Browser) -> None:
    own = {"tokens": 9, "own_tokens": 9, "busy": True, "pinned": False, "expires_in_s": None, "name": None}
    nodes = page.run("return contextNodes(arguments[0])", [{"id": "b", "parent": "gone", **own}])
    assert [(each["label"], each["notes"], each["children"]) for each in nodes] == [("b", ["busy"], [])]


def test_a_tree_by_keyboard(forest: Browser) -> None:
    def focused() -> str:
        return str(forest.run("return document.activeElement.dataset.id"))

    place = "#trial-result"
    assert len(forest.all(f"{place} [tabindex='0']")) == 1
    forest.run("document.querySelector('#trial-result [role=treeitem]').focus()")
    forest.press(Key.ARROW_DOWN, Key.ARROW_DOWN)
    assert focused() == "id-C"
    forest.press(Key.ARROW_LEFT)
    assert focused() == "id-A"
    forest.press(Key.ARROW_LEFT)
    closed = [("1", "A"), ("1", XSS), ("2", "E")]
    assert tree_labels(forest, place) == closed
    forest.run("view.show(arguments[0].map(cacheNodes))", FOREST)  # as the next poll does
    assert tree_labels(forest, place) == closed
    assert focused() == "id-A"
    forest.press(Key.ARROW_RIGHT, Key.ARROW_RIGHT)
    assert focused() == "id-B"
    forest.press(Key.END, Key.HOME)
    assert focused() == "id-A"


def test_big_trees_begin_closed(forest: Browser) -> None:
    many = [node(f"N{number}", 1, node(f"M{number}", 1)) for number in range(100)]
    forest.run("view.show(arguments[0].map(cacheNodes))", many)
    assert len(tree_labels(forest, "#trial-result")) == 100
    forest.one("#trial-result [data-id=id-N5] .node").click()
    assert tree_labels(forest, "#trial-result")[5:8] == [("1", "N5"), ("2", "M5"), ("1", "N6")]
    forest.run("document.querySelector('#trial-result [role=tree]').scrollTop = 900")
    forest.run("view.show(arguments[0].map(cacheNodes))", many)
    assert forest.run("return document.querySelector('#trial-result [role=tree]').scrollTop") == 900


def test_small_ones_of_many_are_folded(forest: Browser) -> None:
    sizes = [1, 300, 1, 200, 1, 100, 60, 61, 59, 1]
    nodes = [node(f"N{index}", size) for index, size in enumerate(sizes)]
    nodes.append(node("top", 1, *(node(f"M{index}", 5) for index in range(8))))
    forest.run("view.show(bySize(arguments[0].map(cacheNodes)))", nodes)
    shown = [("1", name) for name in ("N1", "N3", "N5", "N7", "N6", "N8", "top")]
    below = [("2", f"M{index}") for index in range(6)] + [("2", "2 small ones")]
    assert tree_labels(forest, "#trial-result") == [*shown, *below, ("1", "4 small ones")]
    note = forest.text("#trial-result [data-id='small top'] .note")
    assert note == "exact · 4 tokens, 4.0 kB · at most 1.0 kB each"
    assert "41.0 kB in all" in forest.text("#trial-result [data-id=id-top] .note")
    forest.one("#trial-result [data-id='small top'] .node").click()
    opened = [("2", f"N{index}") for index in (0, 2, 4, 9)]
    assert tree_labels(forest, "#trial-result") == [*shown, *below, ("1", "4 small ones"), *opened]


@pytest.mark.parametrize("sizes", [[1] * 7, [9, 1], [100] * 30])
def test_nothing_is_folded_for_nothing(forest: Browser, sizes: list[int]) -> None:
    nodes = [node(f"N{index}", size) for index, size in enumerate(sizes)]
    forest.run("view.show(bySize(arguments[0].map(cacheNodes)))", nodes)
    assert tree_labels(forest, "#trial-result") == [("1", f"N{index}") for index in range(len(sizes))]


def test_deep_trees_keep_their_words_on_a_phone(forest: Browser) -> None:
    deepest = node("leaf", 1)
    for level in range(47):
        deepest = node(f"level {level}", 1, deepest)
    forest.run("view.show(arguments[0].map(cacheNodes))", [deepest])
    forest.resize(360, 800, is_phone=True)
    assert forest.one("#trial-result [data-id=id-leaf] .label").size["width"] > 40
    assert forest.run("return document.documentElement.scrollWidth") <= 360
