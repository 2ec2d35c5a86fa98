"""Which leaf goes first: by the rhythm of its own visits, never by those of another namespace."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.config import EVICTION_POLICIES
from kvcomm.memory.rhythm import FIRST_GAP_S, MAX_RETURNS, Rhythm, RhythmKind
from kvcomm.memory.tree import RadixTree
from tests.memory.test_tree import Bench, span

ages = st.floats(0, 1e6)
kinds = st.builds(RhythmKind, st.integers(0, 40), st.integers(0, MAX_RETURNS))


@given(st.lists(st.floats(0, 1e7), max_size=8))
def test_a_rhythm_stays_within_the_gaps_it_was_made_of(gaps: list[float]) -> None:
    rhythm = Rhythm()
    for gap_s in gaps:
        rhythm = rhythm.after(gap_s)
    counted = [gap_s for gap_s in gaps if gap_s >= 1]
    assert rhythm.num_returns == len(counted)
    low, high = min([FIRST_GAP_S, *counted]), max([FIRST_GAP_S, *counted])
    assert math.log(low) - 1e-9 <= rhythm.log_gap <= math.log(high) + 1e-9


def test_the_usual_gap_by_hand() -> None:
    rhythm = Rhythm().after(10.0)
    assert math.exp(rhythm.log_gap) == pytest.approx(20.0)  # the geometric mean of 40 and 10
    assert math.exp(rhythm.after(160.0).log_gap) == pytest.approx(40.0)  # of 40, 10 and 160
    for _ in range(40):
        rhythm = rhythm.after(8.0)
    assert rhythm.kind == RhythmKind(6, MAX_RETURNS)


@given(kinds, ages, ages)
def test_waits_grow_with_age_and_fall_with_returns(kind: RhythmKind, one: float, other: float) -> None:
    assert kind.wait_s(min(one, other)) <= kind.wait_s(max(one, other))
    assert kind._replace(num_returns=kind.num_returns + 1).wait_s(one) < kind.wait_s(one)
    gap_s = 2 ** (kind.half_octaves / 2)
    assert kind.wait_s(gap_s) == pytest.approx(kind.wait_s(0.0))  # nobody is overdue before his usual gap


def visited(bench: Bench, path: tuple[int, ...], gap_s: float, times: int, namespace: str = "one") -> None:
    for _ in range(times):
        bench.serve(path, namespace)
        bench.now += gap_s


def test_who_comes_back_soon_stays_though_another_was_used_later() -> None:
    for eviction, gone, kept in (("return", span(100, 8), span(0, 8)), ("lru", span(0, 8), span(100, 8))):
        bench = Bench(eviction=eviction)
        visited(bench, span(0, 8), 8.0, 6)
        bench.serve(span(100, 8), "one")
        assert bench.tree.evict(2) == 2
        assert (bench.cached(gone, "one"), bench.cached(kept, "one")) == (0, 8), eviction


def test_who_is_long_overdue_goes_before_a_newcomer() -> None:
    bench = Bench(eviction="return")
    visited(bench, span(0, 8), 8.0, 6)
    bench.now += 2_000.0
    bench.serve(span(100, 8), "one")
    bench.tree.evict(2)
    assert bench.cached(span(100, 8), "one") == 8


def test_among_equals_the_least_recently_used_goes() -> None:
    bench = Bench(eviction="return")
    for start in (0, 100, 200):
        bench.serve(span(start, 4))
        bench.now += 3.0
    bench.tree.evict(1)
    assert [bench.cached(span(start, 4)) for start in (0, 100, 200)] == [0, 4, 4]


def test_what_was_dropped_keeps_its_rhythm() -> None:
    """Whoever is dropped shortly before each return is no newcomer when he comes."""
    bench = Bench(eviction="return")
    visited(bench, span(0, 8), 8.0, 6)
    bench.tree.evict(100)
    bench.now += 1.0
    bench.serve(span(0, 8), "one")
    bench.serve(span(100, 8), "one")
    bench.tree.evict(2)
    assert bench.cached(span(0, 8), "one") == 8


def test_a_continued_path_goes_on_in_its_rhythm_and_a_branch_off_a_short_beginning_does_not() -> None:
    bench = Bench(eviction="return")
    for num_tokens in range(16, 28, 2):  # a conversation that grows
        visited(bench, span(0, num_tokens), 8.0, 1)
    bench.serve((*span(0, 4), *span(500, 20)), "one")  # another one behind the same system prompt, used last
    bench.tree.evict(4)
    assert bench.cached(span(0, 26), "one") == 26


def test_an_unmatched_rest_keeps_its_own_past() -> None:
    bench = Bench(eviction="return")
    bench.serve(span(0, 8))
    for _ in range(6):
        bench.now += 8.0
        bench.serve((*span(0, 4), 99))
    rests = bench.tree._namespaces.look("namespace").root.children[0].children.values()
    assert sorted(node.rhythm.num_returns for node in rests) == [0, 6]


@given(
    mine=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.5, 3.0, 50.0])), min_size=1, max_size=12),
    other=st.lists(st.integers(0, 3), max_size=12),
)
@settings(max_examples=30, deadline=None)
def test_the_order_within_a_tenant_does_not_depend_on_what_another_does(
    mine: list[tuple[int, float]], other: list[int]
) -> None:
    def left(others: list[int]) -> list[int]:
        bench = Bench(num_pages=200, eviction="return")
        waiting = list(others)
        for which, pause_s in mine:
            bench.serve(span(100 * which, 4), "mine")
            if waiting:
                bench.serve(span(100 * waiting.pop(), 4), "other")
            bench.now += pause_s
        bench.tree.reset("other")
        bench.tree.evict(2)
        return [bench.cached(span(100 * which, 4), "mine") for which in range(4)]

    assert left(other) == left([])


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_a_quota_is_kept_by_the_same_policy(eviction: str) -> None:
    bench = Bench(eviction=eviction)
    visited(bench, span(0, 4), 8.0, 6)
    bench.serve(span(100, 4), "one")
    bench.tree.set_quota("one", 1)
    assert bench.cached(span(0, 4), "one") == (4 if eviction == "return" else 0)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'mru'; known: lru, return"):
        RadixTree(Bench(eviction="return").pool, eviction="mru")
