"""The store of renditions: places, budgets, eviction and TTL; alone and against a naive model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.pool import LayerShape, PageIds, PagePool
from kvcomm.memory.renditions import Rendition, RenditionStore
from kvcomm.memory.segments import Segment
from kvcomm.memory.tree import RadixTree
from tests.stored import stored_in

EXACT, APPROXIMATE = Fidelity.EXACT, Fidelity.APPROXIMATE
PAGE_SIZE = 4
NS = "namespace"


def make_pool(num_pages: int = 32) -> PagePool:
    return PagePool([LayerShape(1, 1, 1)], num_pages=num_pages, page_size=PAGE_SIZE)


class Bench:
    """A store on a small pool, budgets counted in pages, and a clock that moves only when told to."""

    def __init__(self, max_pages: int = 16, ttl_s: float | None = None) -> None:
        self.now = 0.0
        self.pool = make_pool()
        self.store = RenditionStore(
            self.pool, max_bytes=max_pages * self.pool.page_bytes, clock=lambda: self.now, ttl_s=ttl_s
        )

    def put(
        self,
        segment: Segment,
        signature: str = "sig",
        *,
        start: int = 0,
        offset: int = 0,
        fidelity: Fidelity = EXACT,
        namespace: str = NS,
    ) -> Rendition | None:
        pages = self.pool.allocate(-(-(offset + len(segment.token_ids)) // PAGE_SIZE))
        rendition = self.store.put(
            namespace,
            segment,
            signature=signature,
            start=start,
            pages=pages,
            offset=offset,
            fidelity=fidelity,
        )
        self.pool.release(pages)
        self.check()
        return rendition

    def use(self, segment: Segment) -> None:
        for rendition in self.store.renditions_of(NS, segment):
            self.store.touch(NS, rendition)

    def has(self, *segments: Segment, namespace: str = NS) -> list[bool]:
        """Which of them are known; looking is no use."""
        return [bool(self.store.renditions_of(namespace, segment)) for segment in segments]

    def check(self) -> None:
        self.store.check_integrity()
        self.pool.check_integrity(held=self.store.pages_held())


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.check()


def segment(start: int, num_tokens: int = 4) -> Segment:
    return Segment(tuple(range(start, start + num_tokens)))


A, B, C = segment(0), segment(100), segment(200)


def test_a_rendition_comes_back_as_it_was_put(bench: Bench) -> None:
    bench.now = 3.0
    put = bench.put(A, "solver", start=9, offset=1)
    bench.now = 5.0
    (got,) = bench.store.renditions_of(NS, A)
    assert got is put
    assert (got.digest, got.num_tokens, got.signature, got.start, got.offset) == (A.digest(NS), 4, "solver", 9, 1)
    assert (got.fidelity, got.created_s, got.used_s, got.pages.size) == (EXACT, 3.0, 3.0, 2)
    bench.use(A)
    (used,) = bench.store.renditions_of(NS, A)
    assert (used.created_s, used.used_s, used.identity) == (3.0, 5.0, put.identity)
    assert used.pages.tolist() == put.pages.tolist()
    assert bench.has(B) == [False]
    assert bench.has(A, namespace="other") == [False]


def test_those_of_a_segment_come_in_the_order_of_their_use(bench: Bench) -> None:
    for signature in ("one", "two", "three"):
        bench.put(A, signature)
    first, *_ = bench.store.renditions_of(NS, A)
    bench.store.touch(NS, first)
    assert [each.signature for each in bench.store.renditions_of(NS, A)] == ["two", "three", "one"]


def test_the_same_place_holds_one_rendition_per_fidelity(bench: Bench) -> None:
    bench.put(A, start=1)
    again = bench.put(A, start=1)
    bench.put(A, start=1, fidelity=APPROXIMATE)
    bench.put(A, start=2)
    assert again is not None
    assert [(each.start, each.fidelity) for each in stored_in(bench.store, NS)] == [
        (1, EXACT),
        (1, APPROXIMATE),
        (2, EXACT),
    ]
    assert bench.pool.num_free == 32 - 3


def test_putting_the_pages_it_already_holds(bench: Bench) -> None:
    """Dropping the old rendition first once freed the very pages of the new one."""
    held = bench.put(A)
    assert held is not None
    kept = bench.store.put(NS, A, signature="sig", start=0, pages=held.pages, offset=0, fidelity=EXACT)
    assert kept is not None
    assert bench.pool.refcounts(kept.pages).tolist() == [1]


@pytest.mark.parametrize(("num_pages", "offset"), [(0, 0), (2, 0), (1, 1), (1, -1), (2, 4)])
def test_pages_must_cover_the_tokens(bench: Bench, num_pages: int, offset: int) -> None:
    pages = bench.pool.allocate(num_pages)
    with pytest.raises(ValueError, match="4 tokens from slot"):
        bench.store.put(NS, A, signature="s", start=0, pages=pages, offset=offset, fidelity=EXACT)
    bench.pool.release(pages)


def test_an_empty_segment_has_no_rendition(bench: Bench) -> None:
    with pytest.raises(ValueError, match="empty segment"):
        bench.put(Segment(()))


def test_a_digest_alone_is_no_hit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "digest", lambda self, namespace: "collision")
        bench.put(A)
        assert bench.has(A, B) == [True, False]
        pages = bench.pool.allocate(1)
        with pytest.raises(AssertionError, match="two segments"):
            bench.store.put(NS, B, signature="s", start=0, pages=pages, offset=0, fidelity=EXACT)
        bench.pool.release(pages)


def test_budget_at_the_limit_and_one_past_it() -> None:
    bench = Bench(max_pages=3)
    for each in (A, B, C):
        assert bench.put(each) is not None
    bench.use(A)
    bench.put(segment(300))
    assert bench.has(A, B, C) == [True, False, True]
    assert bench.put(segment(400, 13)) is None
    assert bench.has(A, C) == [True, True]  # what can never fit costs nobody anything
    assert bench.put(segment(400, 12)) is not None
    assert bench.has(A) == [False]


def test_a_namespace_over_its_budget_gives_its_own(bench: Bench) -> None:
    bench.put(A, namespace="old")
    bench.put(A)
    bench.put(B)
    bench.store.set_budget(NS, 2 * bench.pool.page_bytes)
    bench.put(C)
    assert bench.has(A, B, C) == [False, True, True]
    assert bench.has(A, namespace="old") == [True]
    bench.store.set_budget(NS, 0)
    assert bench.has(A, B, C) == [False, False, False]
    bench.store.set_budget(NS, None)
    assert bench.put(A) is not None


def test_the_only_rendition_of_a_segment_may_make_room_for_another_of_it() -> None:
    bench = Bench(max_pages=1)
    bench.put(A, "one")
    bench.put(A, "two")
    assert [each.signature for each in bench.store.renditions_of(NS, A)] == ["two"]


def test_time_to_live_starts_anew_with_each_use_of_any_of_a_segment() -> None:
    bench = Bench(ttl_s=10.0)
    bench.put(A, "one")
    bench.put(A, "two")
    bench.put(B)
    bench.now = 6.0
    bench.store.touch(NS, bench.store.renditions_of(NS, A)[1])
    assert [(view.used_s, view.due_s, view.seen_s) for view in bench.store.views(NS)] == [
        (6.0, 16.0, 6.0),
        (0.0, 10.0, 6.0),
    ]
    bench.now = 9.9
    assert bench.store.expire() == 0
    bench.now = 10.0
    assert bench.store.expire() == 1
    assert bench.has(A, B) == [True, False]
    bench.now = 16.0
    assert bench.has(A) == [False]
    bench.check()


def test_without_a_time_to_live_nothing_ends(bench: Bench) -> None:
    bench.put(A)
    bench.now = 1e9
    assert bench.has(A) == [True]
    assert [view.due_s for view in bench.store.views(NS)] == [math.inf]


def test_eviction_frees_pages_and_spares_those_in_use(bench: Bench) -> None:
    busy = bench.put(A)
    assert busy is not None
    bench.put(B)
    bench.put(C)
    bench.pool.retain(busy.pages)
    bench.use(B)
    assert bench.store.evict(1) == 1
    assert bench.has(A, B, C) == [True, True, False]
    bench.pool.release(busy.pages)
    assert bench.store.evict(1) == 1
    assert bench.has(A, B) == [False, True]
    assert bench.store.evict(5) == 1


def test_pages_shared_with_the_tree_can_be_had_back(bench: Bench) -> None:
    """Tree and store once passed over what the other held too, so a full pool stayed full."""
    tree = RadixTree(bench.pool)
    pages = bench.pool.allocate(1)
    tree.insert(NS, A.token_ids, pages)
    bench.store.put(NS, A, signature="s", start=0, pages=pages, offset=0, fidelity=EXACT)
    bench.pool.release(pages)
    assert (tree.evict(1), bench.store.evict(1)) == (0, 0)
    assert bench.store.drop_oldest()
    assert tree.evict(1) == 1
    assert not bench.store.drop_oldest()


def test_reset_keeps_budgets_and_forgetting_does_not(bench: Bench) -> None:
    for clear, is_there in ((bench.store.reset, False), (bench.store.forget, True)):
        bench.store.set_budget(NS, 0)
        bench.put(A, namespace="other")
        clear(NS)
        assert (bench.put(A) is not None) == is_there
        assert bench.has(A, namespace="other") == [True]
    bench.store.reset()
    assert bench.pool.num_free == bench.pool.num_pages


Key = tuple[str, int, Fidelity]
Place = tuple[str, Segment, Key]

namespaces = st.sampled_from(["left", "right"])
segments = st.sampled_from([segment(0, 3), segment(0, 4), segment(0, 9), segment(50, 6)])
signatures = st.sampled_from(["solver", "critic"])
fidelities = st.sampled_from(Fidelity)
budgets = st.none() | st.integers(0, 8)


class StoreMachine(RuleBasedStateMachine):
    """The store against lists and dicts: every use, replacement and dropping is predicted."""

    @initialize(max_pages=st.integers(2, 10), ttl_s=st.none() | st.just(5.0))
    def create(self, max_pages: int, ttl_s: float | None) -> None:
        self.now = 0.0
        self.pool = make_pool(num_pages=24)
        self.max_pages, self.ttl_s = max_pages, math.inf if ttl_s is None else ttl_s
        self.store = RenditionStore(
            self.pool, max_bytes=max_pages * self.pool.page_bytes, clock=lambda: self.now, ttl_s=ttl_s
        )
        self.order: list[Place] = []  # the latest used last
        self.used_s: dict[tuple[str, Segment], float] = {}
        self.sizes: dict[Place, int] = {}
        self.marks: dict[Place, float] = {}  # what stands in its slots
        self.budgets: dict[str, int | None] = {"left": None, "right": None}
        self.users: list[PageIds] = []
        self.next_mark = 0.0

    def pages_of(self, namespace: str | None) -> int:
        return sum(self.sizes[place] for place in self.order if namespace in (None, place[0]))

    def settle(self) -> None:
        self.order = [place for place in self.order if self.used_s[place[:2]] + self.ttl_s > self.now]

    def make_room(self, namespace: str, wanted: int) -> bool:
        own = self.budgets[namespace]
        if wanted > self.max_pages or (own is not None and wanted > own):
            return False
        for scope, limit in ((namespace, own), (None, self.max_pages)):
            for place in list(self.order):
                if scope in (None, place[0]) and limit is not None and self.pages_of(scope) + wanted > limit:
                    self.order.remove(place)
        return True

    @rule(
        namespace=namespaces,
        segment_=segments,
        signature=signatures,
        start=st.integers(0, 1),
        offset=st.integers(0, PAGE_SIZE - 1),
        fidelity=fidelities,
    )
    def put(
        self, namespace: str, segment_: Segment, signature: str, start: int, offset: int, fidelity: Fidelity
    ) -> None:
        num_pages = -(-(offset + len(segment_.token_ids)) // PAGE_SIZE)
        if self.pool.num_free < num_pages:
            return
        pages = self.pool.allocate(num_pages)
        self.next_mark += 1
        self.pool.keys[0][self.slots(pages)] = self.next_mark
        place = (namespace, segment_, (signature, start, fidelity))
        self.settle()
        if place in self.order:
            self.order.remove(place)
        fits = self.make_room(namespace, num_pages)
        if fits:
            self.order.append(place)
            self.used_s[place[:2]] = self.now
            self.sizes[place], self.marks[place] = num_pages, self.next_mark
        stored = self.store.put(
            namespace, segment_, signature=signature, start=start, pages=pages, offset=offset, fidelity=fidelity
        )
        assert (stored is not None) == fits
        self.pool.release(pages)

    def slots(self, pages: PageIds) -> torch.Tensor:
        return torch.from_numpy((pages[:, None].astype(np.int64) * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel())

    def found(self, namespace: str, segment_: Segment) -> dict[Place, Rendition]:
        """What the store has of a segment, which is what it must have."""
        self.settle()
        renditions = self.store.renditions_of(namespace, segment_)
        places = [(namespace, segment_, (each.signature, each.start, each.fidelity)) for each in renditions]
        assert places == [place for place in self.order if place[:2] == (namespace, segment_)]
        for place, rendition in zip(places, renditions, strict=True):
            assert (self.pool.keys[0][self.slots(rendition.pages)] == self.marks[place]).all()
        return dict(zip(places, renditions, strict=True))

    @rule(namespace=namespaces, segment_=segments, data=st.data(), hold=st.booleans())
    def use(self, namespace: str, segment_: Segment, data: st.DataObject, hold: bool) -> None:
        found = self.found(namespace, segment_)
        if found:
            place = data.draw(st.sampled_from(list(found)))
            self.store.touch(namespace, found[place])
            self.used_s[place[:2]] = self.now
            self.order.remove(place)
            self.order.append(place)
            if hold:
                self.pool.retain(found[place].pages)
                self.users.append(found[place].pages)

    @rule(namespace=namespaces, segment_=segments, data=st.data())
    def drop(self, namespace: str, segment_: Segment, data: st.DataObject) -> None:
        found = self.found(namespace, segment_)
        if found:
            place = data.draw(st.sampled_from(list(found)))
            self.store.drop(namespace, found[place])
            self.order.remove(place)

    @rule()
    def stop_using(self) -> None:
        for pages in self.users:
            self.pool.release(pages)
        self.users = []

    @rule(namespace=namespaces, max_pages=budgets)
    def set_budget(self, namespace: str, max_pages: int | None) -> None:
        self.budgets[namespace] = max_pages
        self.make_room(namespace, 0)
        self.store.set_budget(namespace, None if max_pages is None else max_pages * self.pool.page_bytes)

    @rule(num_pages=st.integers(0, 6))
    def evict(self, num_pages: int) -> None:
        held = {page for pages in self.users for page in pages.tolist()}
        pages_at = {
            (name, r.digest, (r.signature, r.start, r.fidelity)): r.pages.tolist()
            for name in self.budgets
            for r in stored_in(self.store, name)
        }
        freed = 0
        for place in list(self.order):
            pages = pages_at[(place[0], place[1].digest(place[0]), place[2])]
            free = len(set(pages) - held)
            if freed < num_pages and free:
                self.order.remove(place)
                freed += free
        assert self.store.evict(num_pages) == freed

    @rule(seconds=st.sampled_from([1.0, 4.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        free = self.pool.num_free
        self.settle()
        assert self.store.expire() == self.pool.num_free - free

    @rule(namespace=st.none() | namespaces, and_budget=st.booleans())
    def reset(self, namespace: str | None, and_budget: bool) -> None:
        if namespace is not None and and_budget:
            self.store.forget(namespace)
            self.budgets[namespace] = None
        else:
            self.store.reset(namespace)
        self.order = [place for place in self.order if namespace not in (None, place[0])]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        self.pool.check_integrity(held=[*self.store.pages_held(), *self.users])
        for namespace in self.budgets:
            stored = {(r.digest, (r.signature, r.start, r.fidelity)) for r in stored_in(self.store, namespace)}
            assert stored == {(s.digest(namespace), k) for name, s, k in self.order if name == namespace}

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.stop_using()
        self.store.reset()
        assert self.pool.allocate(24).tolist() == list(range(24))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
