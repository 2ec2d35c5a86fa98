"""How long pages live and lie unused, against a clock moved by hand: pages of 4 tokens."""

from __future__ import annotations

import pytest

from kvcomm.memory.ages import BOUNDS_S, Histogram
from tests.memory.test_tree import NS, Bench

FIRST = tuple(range(100, 112))  # three pages
OTHER = (*FIRST[:8], 7, 8, 9)  # two of them, and one of its own


@pytest.fixture
def bench() -> Bench:
    return Bench()


def total(histogram: Histogram) -> tuple[int, float]:
    return sum(histogram.counts), histogram.sum_s


def test_buckets() -> None:
    histogram = Histogram()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] + 0.01, BOUNDS_S[-1] + 1):
        histogram.add(seconds, 2)
    assert histogram.counts == [4, 2, *[0] * (len(BOUNDS_S) - 2), 2]


def test_gaps_are_of_the_pages_found(bench: Bench) -> None:
    bench.serve(FIRST)
    assert total(bench.tree.ages.reuse_gap) == (0, 0.0)
    bench.now = 10.0
    bench.serve(OTHER)
    assert total(bench.tree.ages.reuse_gap) == (2, 20.0)
    bench.now = 15.0
    bench.serve(FIRST)  # two pages were used 5 s ago, the third 15 s ago
    assert total(bench.tree.ages.reuse_gap) == (5, 20.0 + 2 * 5 + 15)
    bench.tree.peek(NS, FIRST)
    assert total(bench.tree.ages.reuse_gap)[0] == 5


def test_a_page_of_two_nodes_counts_once(bench: Bench) -> None:
    bench.serve(FIRST)
    bench.serve((*FIRST[:6], 1, 2))  # splits in the middle of the second page
    before = total(bench.tree.ages.reuse_gap)[0]
    bench.serve(FIRST)
    assert total(bench.tree.ages.reuse_gap)[0] == before + 3


def test_lives_end_with_a_drop(bench: Bench) -> None:
    bench.serve(FIRST)
    bench.now = 10.0
    bench.serve(OTHER)  # splits: the first two pages stay as old as they are
    bench.now = 30.0
    assert bench.tree.evict(2) == 2  # the tails: one of 30 s, unused as long, one of 20 s
    ages = bench.tree.ages
    assert total(ages.lifetime) == (2, 50.0)
    assert total(ages.idle) == (2, 50.0)
    bench.tree.reset()
    assert total(ages.lifetime) == (4, 50.0 + 2 * 30)
    assert total(ages.idle) == (4, 50.0 + 2 * 20)
