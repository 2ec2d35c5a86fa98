"""The segment tree as a view: chains share beginnings, coverage follows the radix tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.memory.pool import PagePool
from kvcomm.memory.segment_tree import SegmentTreeView, token_path
from kvcomm.memory.segments import Segment
from kvcomm.memory.tree import RadixTree

NS = "namespace"
SYSTEM = Segment(tuple(range(10)), "system")
TOOLS = Segment(tuple(range(100, 106)), "tools")
QUESTION = Segment(tuple(range(200, 203)))
ANSWER = Segment(tuple(range(300, 307)), "answer")


@pytest.fixture
def tree() -> RadixTree:
    return RadixTree(PagePool([], num_pages=64, page_size=4))


def cache(tree: RadixTree, chain: list[Segment], num_tokens: int | None = None) -> None:
    path = token_path(chain)[:num_tokens]
    pages = tree._pool.allocate(-(-path.size // 4))
    tree.insert(NS, path, pages)
    tree._pool.release(pages)


def test_the_path_is_all_tokens_in_order() -> None:
    assert token_path([TOOLS, QUESTION]).tolist() == [100, 101, 102, 103, 104, 105, 200, 201, 202]
    assert token_path([]).dtype == np.int32


def test_coverage_ends_inside_a_segment(tree: RadixTree) -> None:
    view = SegmentTreeView(tree)
    chain = [SYSTEM, TOOLS, QUESTION]
    assert view.coverage(NS, chain) == (0, 0, (0, 0, 0))
    cache(tree, chain, 12)
    assert view.coverage(NS, chain) == (12, 1, (10, 2, 0))
    assert view.coverage(NS, [SYSTEM, QUESTION]) == (10, 1, (10, 0))
    assert view.coverage("other", chain).num_tokens == 0
    cache(tree, chain)
    assert view.coverage(NS, chain) == (19, 3, (10, 6, 3))
    assert view.coverage(NS, []) == (0, 0, ())


def test_chains_share_their_beginnings(tree: RadixTree) -> None:
    view = SegmentTreeView(tree)
    view.record(NS, [SYSTEM, TOOLS, QUESTION])
    view.record(NS, [SYSTEM, TOOLS])
    view.record(NS, [SYSTEM, ANSWER])
    view.record(NS, [])
    cache(tree, [SYSTEM, TOOLS], 13)
    nodes = list(view.walk(NS))
    assert sorted((n.depth, n.name, n.num_tokens, n.cached_tokens) for n in nodes if n.name) == [
        (1, "system", 10, 10),
        (2, "answer", 7, 0),
        (2, "tools", 6, 3),
    ]
    assert nodes[0].name == "system"
    assert [n.depth for n in nodes if n.digest == QUESTION.digest(NS)] == [3]
    names = [n.name for n in nodes]
    assert names[names.index("tools") + 1] is None  # the question stands right below the tools


def test_rendered_one_segment_a_line(tree: RadixTree) -> None:
    view = SegmentTreeView(tree)
    view.record(NS, [SYSTEM, QUESTION])
    cache(tree, [SYSTEM, QUESTION], 11)
    assert view.render(NS) == f"system  10/10\n  {QUESTION.digest(NS)[:12]}  1/3"
    assert view.render("other") == ""


def test_the_oldest_chain_is_forgotten(tree: RadixTree) -> None:
    view = SegmentTreeView(tree, max_chains=2)
    view.record(NS, [SYSTEM])
    view.record(NS, [TOOLS])
    view.record(NS, [SYSTEM])  # young again
    view.record(NS, [ANSWER])
    assert {n.name for n in view.walk(NS)} == {"system", "answer"}
    view.forget(NS)
    assert list(view.walk(NS)) == []


def test_chains_are_bounded_by_their_tokens(tree: RadixTree) -> None:
    """A chain outlives its context: making and deleting long ones took memory that no quota knew."""
    view = SegmentTreeView(tree, max_tokens=100)
    view.record("quiet", [SYSTEM, QUESTION])
    for start in range(50):
        view.record("busy", [Segment(tuple(range(start, start + 30)))])
        view.record("busy", [Segment(tuple(range(start, start + 30)))])  # again: counted once
    assert [node.num_tokens for node in view.walk("quiet")] == [10, 3]  # nobody's chains go for another's
    assert len(list(view.walk("busy"))) == 2
    assert view._num_tokens.total() == 73
    view.record("busy", [Segment(tuple(range(101)))])
    assert list(view.walk("busy")) == []
    view.forget("quiet")
    assert view._chains == view._num_tokens == {}


def test_looking_is_no_use(tree: RadixTree) -> None:
    view = SegmentTreeView(tree)
    cache(tree, [SYSTEM])
    cache(tree, [TOOLS])
    view.record(NS, [SYSTEM])
    usage = tree.usage(NS)
    list(view.walk(NS))
    assert tree.usage(NS) == usage
    tree.evict(1)
    assert view.coverage(NS, [SYSTEM]).num_tokens == 8
    assert view.coverage(NS, [TOOLS]).num_tokens == 6


@given(st.lists(st.lists(st.sampled_from([SYSTEM, TOOLS, QUESTION, ANSWER]), min_size=1, max_size=4), max_size=6))
@settings(deadline=None, max_examples=50)
def test_walk_yields_every_prefix_of_every_chain_once(chains: list[list[Segment]]) -> None:
    view = SegmentTreeView(RadixTree(PagePool([], num_pages=4, page_size=4)))
    for chain in chains:
        view.record(NS, chain)
    path: list[str] = []
    walked = []
    for node in view.walk(NS):
        path = [*path[: node.depth - 1], node.digest]
        assert len(path) == node.depth  # the parent came before
        walked.append(tuple(path))
    prefixes = {tuple(s.digest(NS) for s in chain[: n + 1]) for chain in chains for n in range(len(chain))}
    assert sorted(walked) == sorted(prefixes)
