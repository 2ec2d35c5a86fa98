"""The tree's promises one at a time: mid-page splits, copy-on-write neighbors, LRU, TTL, pins, quota,
reasons, events."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.config import EVICTION_POLICIES
from kvcomm.memory.events import EventKind, EventLog
from kvcomm.memory.leaves import LeafQueue
from kvcomm.memory.node import common_prefix
from kvcomm.memory.tree import MissReason, RadixTree
from tests.memory.kv_model import MarkedPool, MarkedSequence, Path

PAGE_SIZE = 4
NS = "namespace"


class Bench:
    """A tree on a marked pool with a clock that only moves when told to."""

    def __init__(self, num_pages: int = 24, ttl_s: float | None = None, eviction: str = EVICTION_POLICIES[0]) -> None:
        self.now = 0.0
        self.marked = MarkedPool(num_pages, PAGE_SIZE)
        self.pool = self.marked.pool
        self.tree = RadixTree(self.pool, clock=lambda: self.now, ttl_s=ttl_s, eviction=eviction)

    def serve(self, path: Path, namespace: str = NS, ttl_s: float | None = None) -> int:
        """Match, compute the rest, insert, let go; returns the number of tokens that were cached."""
        match = self.tree.match(namespace, path)
        self.marked.check(namespace, path[: match.num_tokens], match.pages)
        sequence = MarkedSequence(self.marked, namespace)
        sequence.adopt(path[: match.num_tokens], match.pages)
        sequence.extend(path[match.num_tokens :])
        self.tree.insert(namespace, path, sequence.pages, ttl_s=ttl_s)
        sequence.release()
        self.check()
        return match.num_tokens

    def cached(self, path: Path, namespace: str = NS) -> int:
        return self.tree.peek(namespace, path)

    def reason(self, path: Path, namespace: str = NS) -> MissReason | None:
        return self.tree.match(namespace, path).reason

    def check(self) -> None:
        self.tree.check_integrity()
        self.pool.check_integrity(held=self.tree.pages_held())


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.check()


def span(start: int, num_tokens: int) -> Path:
    return tuple(range(start, start + num_tokens))


@pytest.mark.parametrize("num_tokens", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 63])
def test_what_was_inserted_is_found(bench: Bench, num_tokens: int) -> None:
    assert bench.serve(span(0, num_tokens)) == 0
    match = bench.tree.match(NS, span(0, num_tokens))
    assert (match.num_tokens, match.reason) == (num_tokens, None)
    bench.marked.check(NS, span(0, num_tokens), match.pages)


@pytest.mark.parametrize("shared", [1, 3, 4, 5, 7, 8, 9])
def test_a_split_inside_a_page_keeps_both_branches_right(bench: Bench, shared: int) -> None:
    left, right = span(0, 12), span(0, shared) + span(100, 12 - shared)
    bench.serve(left)
    assert bench.serve(right) == shared
    for path in (left, right):
        match = bench.tree.match(NS, path)
        assert match.num_tokens == 12
        bench.marked.check(NS, path, match.pages)
    inner = bench.tree.match(NS, (*span(0, shared), 999))
    assert inner.num_tokens == shared
    bench.marked.check(NS, span(0, shared), inner.pages)


def test_many_splits_of_one_page_count_it_once(bench: Bench) -> None:
    for cut in range(4, 0, -1):
        bench.serve((*span(0, cut), 100 + cut))
    # One page holds tokens 0 to 3, each branch has copied it (and the first went on to a second page).
    assert bench.tree.usage(NS).num_tokens == 4 + 4
    assert bench.tree.usage(NS).num_pages == 5


def test_the_deepest_page_wins_where_two_cover_one_index(bench: Bench) -> None:
    bench.serve(span(0, 6))
    bench.serve(span(0, 10))  # copies the half-full second page
    pages = {node.depth: node.num_pages for node in bench.tree.walk(NS)}
    assert pages == {1: 2, 2: 2}
    full = bench.tree.match(NS, span(0, 10))
    part = bench.tree.match(NS, span(0, 6))
    assert full.pages[1] != part.pages[1]
    bench.marked.check(NS, span(0, 10), full.pages)
    bench.marked.check(NS, span(0, 6), part.pages)


def test_a_partial_last_page_is_copied_before_it_is_extended(bench: Bench) -> None:
    sequence = MarkedSequence(bench.marked, NS, span(0, 6))
    bench.tree.insert(NS, sequence.path, sequence.pages)
    sequence.extend(span(50, 3))
    assert bench.pool.bytes_copied == 2 * 2 * 4  # two tokens, key and value, float32
    bench.marked.check(NS, span(0, 6), bench.tree.match(NS, span(0, 6)).pages)
    sequence.release()


def test_a_duplicate_keeps_the_old_pages(bench: Bench) -> None:
    bench.serve(span(0, 8))
    before = bench.tree.match(NS, span(0, 8)).pages
    again = MarkedSequence(bench.marked, NS, span(0, 12))
    assert bench.tree.insert(NS, again.path, again.pages) == 4
    after = bench.tree.match(NS, span(0, 12)).pages
    assert after[:2].tolist() == before.tolist()
    assert after[2] == again.pages[2]
    again.release()


def test_namespaces_never_meet(bench: Bench) -> None:
    bench.serve(span(0, 8), "alice")
    assert bench.cached(span(0, 8), "bob") == 0
    assert bench.serve(span(0, 8), "bob") == 0
    alice, bob = (bench.tree.match(name, span(0, 8)).pages.tolist() for name in ("alice", "bob"))
    assert not set(alice) & set(bob)
    assert bench.tree.usage("bob").hit_tokens == 8
    assert bench.tree.usage("carol") == (0, 0, None, 0, 0, 0, 0, 0)
    assert bench.tree.namespaces() == ("alice", "bob")


def test_an_insert_needs_the_whole_page_table(bench: Bench) -> None:
    pages = bench.pool.allocate(3)
    with pytest.raises(ValueError, match="9 tokens need 3 pages of 4, not 2"):
        bench.tree.insert(NS, span(0, 9), pages[:2])
    assert bench.tree.insert(NS, span(0, 9), pages) == 9
    bench.pool.release(pages)


@pytest.mark.parametrize("tokens", [np.zeros((2, 2), dtype=np.int32), np.array([0.5])])
def test_token_ids_are_one_row_of_integers(bench: Bench, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one row of integers"):
        bench.tree.match(NS, tokens)


def test_eviction_follows_the_order_of_use(bench: Bench) -> None:
    for start in (0, 100, 200):
        bench.serve(span(start, 8))
    bench.tree.match(NS, span(0, 8))
    assert bench.tree.evict(2) == 2
    assert [bench.cached(span(start, 8)) for start in (0, 100, 200)] == [8, 0, 8]
    assert bench.tree.evict(2) == 2
    assert [bench.cached(span(start, 8)) for start in (0, 100, 200)] == [8, 0, 0]


def test_eviction_takes_no_more_than_it_must(bench: Bench) -> None:
    bench.serve(span(0, 18))
    assert bench.tree.evict(2) == 2
    assert bench.cached(span(0, 18)) == 12
    match = bench.tree.match(NS, span(0, 18))
    bench.marked.check(NS, span(0, 12), match.pages)
    assert match.reason is MissReason.EVICTED
    assert bench.tree.usage(NS).evicted_tokens == 6


def test_the_unmatched_rest_of_a_node_keeps_its_own_age(bench: Bench) -> None:
    """A prefix hit once made the whole edge young, so the branch nobody used outlived those in use."""
    bench.serve(span(0, 16))
    bench.serve(span(200, 8))
    bench.serve(span(0, 4) + span(300, 4))  # splits the first path at 4
    assert bench.tree.evict(3) == 3
    assert bench.cached(span(0, 16)) == 4
    assert bench.cached(span(200, 8)) == 8


def test_parents_follow_their_children(bench: Bench) -> None:
    bench.serve(span(0, 8) + span(100, 4))
    bench.serve(span(0, 8) + span(200, 4))
    num_pages = bench.tree.usage(NS).num_pages
    assert bench.tree.evict(100) == num_pages
    assert bench.pool.num_free == bench.pool.num_pages
    assert list(bench.tree.walk(NS)) == []


def test_pages_in_use_elsewhere_are_passed_over(bench: Bench) -> None:
    bench.serve(span(100, 8))
    busy = MarkedSequence(bench.marked, NS, span(0, 8))
    bench.tree.insert(NS, busy.path, busy.pages)
    bench.tree.match(NS, span(100, 8))
    assert bench.tree.evict(4) == 2
    assert bench.cached(span(0, 8)) == 8
    assert bench.cached(span(100, 8)) == 0
    busy.release()
    assert bench.tree.evict(4) == 2


def test_pins_count_and_protect_a_node_through_splits(bench: Bench) -> None:
    bench.serve(span(0, 12))
    for _ in range(2):
        bench.tree.pin(NS, span(0, 12))
    bench.serve(span(0, 6) + span(100, 6))
    bench.tree.evict(100)
    assert bench.cached(span(0, 12)) == 12
    assert bench.tree.unpin(NS, span(0, 12)) == 12
    bench.tree.evict(100)
    assert bench.cached(span(0, 12)) == 12
    assert bench.tree.unpin(NS, span(0, 12)) == 12
    bench.tree.evict(100)
    assert bench.cached(span(0, 12)) == 0


def test_reset_drops_what_is_pinned_too_in_one_namespace(bench: Bench) -> None:
    bench.serve(span(0, 8))
    bench.serve(span(0, 4) + span(100, 4))
    bench.serve(span(0, 8), "other")
    bench.tree.pin(NS, span(0, 4) + span(100, 4))
    bench.tree.reset(NS)
    assert bench.tree.usage(NS).num_tokens == 0
    assert bench.cached(span(0, 8), "other") == 8
    assert bench.reason(span(0, 8)) is MissReason.NEW
    bench.tree.reset()
    assert bench.pool.num_free == bench.pool.num_pages


def test_pins_outlive_eviction_and_time_but_cover_only_their_tokens() -> None:
    bench = Bench(ttl_s=10.0)
    bench.serve(span(0, 12))
    assert bench.tree.pin(NS, span(0, 8)) == 8
    assert bench.tree.pin(NS, span(50, 8)) == 0
    bench.now = 100.0
    assert bench.tree.expire() == 1
    bench.tree.evict(100)
    assert bench.cached(span(0, 12)) == 8
    assert bench.tree.unpin(NS, span(0, 12)) == 8
    assert bench.tree.unpin(NS, span(0, 12)) == 0
    assert bench.cached(span(0, 12)) == 0  # its time was over long ago
    bench.check()


def test_use_renews_the_time_to_live() -> None:
    bench = Bench(ttl_s=10.0)
    bench.serve(span(0, 8))
    bench.serve(span(100, 8))
    bench.now = 9.0
    bench.tree.match(NS, span(0, 8))
    bench.now = 10.0
    assert bench.tree.expire() == 2
    assert [bench.cached(span(0, 8)), bench.cached(span(100, 8))] == [8, 0]
    assert bench.reason(span(100, 8)) is MissReason.EXPIRED
    assert bench.tree.usage(NS).expired_tokens == 8
    bench.now = 19.0
    assert bench.cached(span(0, 8)) == 0  # nobody had to call expire
    bench.check()


def test_a_longer_time_to_live_prolongs_the_path_above() -> None:
    bench = Bench(ttl_s=10.0)
    bench.serve(span(0, 8))
    bench.serve(span(0, 4) + span(100, 4), ttl_s=50.0)
    bench.serve(span(200, 8), ttl_s=math.inf)
    bench.now = 20.0
    bench.tree.expire()
    assert bench.cached(span(0, 8)) == 4
    assert bench.cached(span(0, 4) + span(100, 4)) == 8
    bench.now = 1e9
    bench.tree.expire()
    assert bench.tree.usage(NS).num_tokens == 8
    bench.check()


def test_prolonging_a_prefix_does_not_prolong_the_rest() -> None:
    bench = Bench(ttl_s=10.0)
    bench.serve(span(0, 12))
    bench.serve(span(0, 6), ttl_s=50.0)
    bench.now = 20.0
    assert bench.cached(span(0, 12)) == 6
    bench.check()


def test_quota_at_the_limit_and_one_past_it(bench: Bench) -> None:
    bench.tree.set_quota(NS, 4)
    bench.serve(span(0, 16))
    assert bench.cached(span(0, 16)) == 16
    bench.serve(span(100, 4))
    assert bench.cached(span(0, 16)) == 12
    assert bench.cached(span(100, 4)) == 4
    assert bench.reason(span(0, 16)) is MissReason.QUOTA
    assert bench.tree.usage(NS).quota_tokens == 4
    assert bench.tree.usage(NS).num_pages == 4


def test_quota_stores_the_head_of_what_cannot_fit(bench: Bench) -> None:
    bench.tree.set_quota(NS, 2)
    bench.serve(span(0, 15))
    assert bench.cached(span(0, 15)) == 8
    assert bench.reason(span(0, 15)) is MissReason.QUOTA
    bench.tree.set_quota(NS, 0)
    assert bench.cached(span(0, 15)) == 0
    bench.serve(span(0, 15))
    assert bench.reason(span(0, 15)) is MissReason.QUOTA
    bench.tree.set_quota(NS, None)
    bench.serve(span(0, 15))
    assert bench.cached(span(0, 15)) == 15
    with pytest.raises(ValueError, match="cannot be -1 pages"):
        bench.tree.set_quota(NS, -1)


def test_quota_takes_from_its_own_namespace_only(bench: Bench) -> None:
    bench.serve(span(0, 8), "old")
    bench.tree.set_quota(NS, 2)
    bench.serve(span(0, 8))
    bench.serve(span(100, 8))
    assert bench.cached(span(0, 8), "old") == 8
    assert bench.cached(span(0, 8)) == 0
    assert bench.cached(span(100, 8)) == 8


def test_a_pin_may_exceed_the_quota_until_it_ends(bench: Bench) -> None:
    bench.serve(span(0, 8))
    bench.tree.pin(NS, span(0, 8))
    bench.tree.set_quota(NS, 1)
    assert bench.cached(span(0, 8)) == 8
    bench.tree.unpin(NS, span(0, 8))
    assert bench.cached(span(0, 8)) == 4


def test_an_insertion_does_not_evict_its_own_path(bench: Bench) -> None:
    bench.serve(span(0, 8))
    bench.tree.set_quota(NS, 3)
    bench.serve(span(0, 8) + span(100, 8))
    assert bench.cached(span(0, 8) + span(100, 8)) == 12


def test_reasons_of_misses(bench: Bench) -> None:
    assert bench.reason(span(0, 8)) is MissReason.NEW
    bench.serve(span(0, 8))
    assert bench.reason((*span(0, 4), 99)) is MissReason.NEW
    bench.tree.evict(100)
    assert bench.reason(span(0, 8)) is MissReason.EVICTED
    bench.serve(span(0, 4))
    assert bench.reason(span(0, 8)) is MissReason.NEW  # nothing is known about what followed the evicted token
    bench.tree.evict(100)
    assert bench.reason(span(0, 8)) is MissReason.EVICTED


def test_tombstones_are_bounded() -> None:
    bench = Bench(num_pages=100)
    for start in range(0, 700, 7):
        bench.serve(span(1000 * start, 4))
    assert bench.tree.evict(100) == 100
    reasons = [bench.reason(span(1000 * start, 4)) for start in range(0, 700, 7)]
    assert reasons[:36] == [MissReason.NEW] * 36
    assert reasons[36:] == [MissReason.EVICTED] * 64


def test_the_views_change_nothing(bench: Bench) -> None:
    bench.serve(span(0, 8))
    bench.serve(span(0, 6) + span(100, 6))
    bench.serve(span(200, 8))
    bench.tree.pin(NS, span(200, 8))
    bench.now = 5.0
    shape = {(n.depth, n.start, n.end, n.num_children, n.pinned, n.idle_s) for n in bench.tree.walk(NS)}
    assert shape == {
        (1, 0, 6, 2, False, 5.0),
        (2, 6, 8, 0, False, 5.0),
        (2, 6, 12, 0, False, 5.0),
        (1, 0, 8, 0, True, 5.0),
    }
    usage = bench.tree.usage(NS)
    assert bench.cached(span(0, 8)) == 8
    assert bench.cached(span(0, 8), "unknown") == 0
    assert bench.tree.usage(NS) == usage
    assert bench.tree.namespaces() == (NS,)
    with pytest.raises(ValueError, match="read-only"):
        next(bench.tree.walk(NS)).tokens[0] = 1
    bench.tree.evict(1)
    assert bench.cached(span(0, 8)) == 6  # peeking did not make it younger


def test_events_tell_the_story_from_the_first_question_on(bench: Bench) -> None:
    bench.serve(span(0, 4))
    assert bench.tree.take_events() == []
    bench.serve(span(0, 8))
    bench.tree.evict(1)
    bench.tree.reset()
    stored, evicted, reset = bench.tree.take_events()
    assert (stored.kind, stored.start, stored.end, stored.reason) == (EventKind.STORED, 4, 8, None)
    assert (stored.namespace, stored.path.tolist()) == (NS, list(span(0, 8)))
    assert (evicted.kind, evicted.start, evicted.end, evicted.reason) == (EventKind.REMOVED, 4, 8, "evicted")
    assert evicted.path.tolist() == list(span(0, 8))
    assert (reset.start, reset.path.tolist(), reset.reason) == (0, list(span(0, 4)), "reset")
    assert bench.tree.take_events() == []


def test_recent_drops_say_what_went_when_and_why(bench: Bench) -> None:
    assert bench.tree.recent_drops(NS) == []
    bench.serve(span(0, 40))
    bench.serve(span(100, 4), ttl_s=5.0)
    bench.serve(span(200, 4), "other")
    bench.now = 2.0
    bench.tree.set_quota(NS, 10)
    bench.now = 6.0
    bench.tree.expire()
    bench.now = 10.0
    bench.tree.reset()
    found = [
        (ago_s, drop.start, drop.num_tokens, drop.head, drop.reason) for ago_s, drop in bench.tree.recent_drops(NS)
    ]
    assert found == [
        (0.0, 0, 36, span(0, 16), "reset"),
        (4.0, 0, 4, span(100, 4), "expired"),
        (8.0, 36, 4, span(36, 4), "quota"),
    ]
    assert [drop.head for _, drop in bench.tree.recent_drops("other")] == [span(200, 4)]


def test_only_the_latest_drops_are_kept(bench: Bench) -> None:
    for start in range(100):
        bench.serve(span(start, 4))
        bench.tree.reset()
    firsts = [drop.head[0] for _, drop in bench.tree.recent_drops(NS)]
    assert firsts == list(range(99, 99 - len(firsts), -1))
    assert 10 < len(firsts) < 100


def test_a_reader_who_stays_away_is_told_so(bench: Bench) -> None:
    log = EventLog(max_events=2)
    log.take()
    bench.tree.take_events()
    for start in (0, 100, 200):
        bench.serve(span(start, 4))
    events = bench.tree.take_events()
    for event in events:
        log.record(event)
    lost, *rest = log.take()
    assert (lost.kind, lost.num_lost) == (EventKind.LOST, 1)
    assert rest == events[1:]


def test_what_waits_for_a_reader_is_bounded_in_tokens_too(bench: Bench) -> None:
    log = EventLog(max_tokens=8)
    log.take()
    bench.tree.take_events()
    assert not bench.tree.has_events
    for start in (0, 100, 200):
        bench.serve(span(start, 4))
    assert bench.tree.has_events
    for event in bench.tree.take_events():
        log.record(event)
    lost, *rest = log.take()
    assert (lost.kind, lost.num_lost) == (EventKind.LOST, 1)
    assert [event.path[0] for event in rest] == [100, 200]
    assert log.is_empty


def test_all_that_is_there_is_told_with_prefixes_first(bench: Bench) -> None:
    bench.serve(span(0, 8))
    bench.serve(span(0, 6) + span(100, 6))
    bench.serve(span(200, 4), "other")
    told = bench.tree.all_stored()
    assert {(event.namespace, event.start, tuple(event.path.tolist())) for event in told} == {
        (NS, 0, span(0, 6)),
        (NS, 6, span(0, 8)),
        (NS, 6, span(0, 6) + span(100, 6)),
        ("other", 0, span(200, 4)),
    }
    assert next(event.end for event in told if event.namespace == NS) == 6


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_queues_do_not_grow_with_use(eviction: str) -> None:
    """Pins, refreshed paths and expired ones once left their queue entries behind for good."""
    bench = Bench(eviction=eviction)
    bench.serve(span(0, 8))
    for _ in range(500):
        bench.tree.match(NS, span(0, 8))
        bench.tree.pin(NS, span(0, 8))
        bench.tree.unpin(NS, span(0, 8))
        bench.serve(span(100, 4), ttl_s=1.0)
        bench.now += 2.0
        bench.tree.expire()
    order = bench.tree._reaper._order
    queues = [order] if isinstance(order, LeafQueue) else list(order._queues.values())
    assert sum(len(queue._heap) for queue in queues) < 100
    assert len(bench.tree._reaper._expiry._heap) < 100


def test_nested_prefixes_deeper_than_the_stack() -> None:
    depth = 1_100
    assert depth > sys.getrecursionlimit()
    marked = MarkedPool(depth, 1)
    tree = RadixTree(marked.pool)
    pages = marked.pool.allocate(depth)
    for end in range(1, depth + 1):
        tree.insert(NS, np.arange(end), pages[:end])
    marked.pool.release(pages)
    assert tree.match(NS, np.arange(depth)).pages.tolist() == pages.tolist()
    assert max(node.depth for node in tree.walk(NS)) == depth
    tree.check_integrity()
    assert tree.evict(depth - 1) == depth - 1
    assert tree.peek(NS, np.arange(depth)) == 1


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
@settings(deadline=None)
def test_common_prefix_against_a_loop(left: int, right: int, differs_at: int) -> None:
    a, b = np.arange(left, dtype=np.int32), np.arange(right, dtype=np.int32)
    b[differs_at:] += 1
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(left, right))
    assert common_prefix(a, b) == expected


def test_unpinning_reports_its_tokens_even_if_the_quota_takes_them(bench: Bench) -> None:
    """The length was once read off the node after the quota had emptied it."""
    bench.serve(span(0, 8))
    bench.tree.pin(NS, span(0, 8))
    bench.tree.set_quota(NS, 0)
    assert bench.cached(span(0, 8)) == 8
    assert bench.tree.unpin(NS, span(0, 8)) == 8
    assert bench.cached(span(0, 8)) == 0


def test_eviction_of_a_split_node_takes_no_more_than_it_must(bench: Bench) -> None:
    bench.serve(span(0, 18))
    bench.serve(span(0, 6))
    bench.serve(span(0, 6) + span(100, 2))  # splits at 6: the lower half shares its first page with the upper one
    bench.tree.match(NS, span(0, 6) + span(100, 2))
    assert bench.tree.evict(1) == 1
    assert bench.cached(span(0, 18)) == 16


def test_a_split_moves_the_lower_half_forward_in_its_queue(bench: Bench) -> None:
    """It once stayed at the place its partial use had earned, and outlived paths used after it."""
    bench.serve(span(0, 16))
    bench.serve(span(100, 8))
    bench.tree.match(NS, span(0, 4))
    assert bench.tree.evict(1) == 1  # looks at the first path, finds it used, takes from the second
    assert bench.cached(span(100, 8)) == 4
    bench.serve(span(0, 4) + span(200, 4))
    assert bench.tree.evict(1) == 1
    assert bench.cached(span(0, 16)) == 12
    assert bench.cached(span(100, 8)) == 4


def test_quota_counts_a_page_once_that_two_nodes_share(bench: Bench) -> None:
    bench.tree.set_quota(NS, 3)
    sequence = MarkedSequence(bench.marked, NS, span(0, 10))
    assert bench.tree.insert(NS, sequence.path[:6], sequence.pages[:2]) == 6
    assert bench.tree.insert(NS, sequence.path, sequence.pages) == 4
    assert bench.tree.usage(NS).num_pages == 3
    sequence.release()


def test_a_page_counts_once_that_a_node_shares_with_a_distant_ancestor(bench: Bench) -> None:
    """The node between them has the same tokens on another page, so its last page says nothing about theirs."""
    first, second, third = (bench.pool.allocate(1) for _ in range(3))
    bench.tree.insert(NS, [1, 2, 3, 4], first, ttl_s=1.0)
    bench.tree.insert(NS, [1, 2, 7, 8], second)
    bench.now += 2.0  # [3, 4] goes, and [1, 2] stays on the first page
    bench.tree.insert(NS, [1, 2, 3], third)
    bench.tree.insert(NS, [1, 2, 3, 4], first)
    assert bench.tree.usage(NS).num_pages == 3
    bench.tree.check_integrity()
    for pages in (first, second, third):
        bench.pool.release(pages)
    bench.tree.evict(24)
    assert bench.tree.usage(NS).num_pages == 0


def test_a_leaf_that_could_not_grow_can_still_go(bench: Bench) -> None:
    """Protected while room was made for its continuation, it once dropped out of the queues for good."""
    bench.serve(span(0, 4))
    bench.tree.set_quota(NS, 1)
    bench.serve(span(0, 8))
    assert bench.cached(span(0, 8)) == 4
    assert bench.tree.evict(1) == 1


def test_what_shares_a_page_with_its_parent_stays_until_more_is_needed(bench: Bench) -> None:
    bench.serve(span(0, 12))
    bench.serve(span(0, 6) + span(100, 1))
    bench.tree.match(NS, span(0, 6) + span(100, 1))
    assert bench.tree.evict(1) == 1
    assert bench.cached(span(0, 12)) == 8  # tokens 6 and 7 stand on the page of token 5
    bench.tree.set_quota(NS, 1)
    assert bench.tree.usage(NS).num_pages == 1
