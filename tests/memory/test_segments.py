"""Segments and their store: identity, names, fidelity, budgets, TTL and pins; alone and against a naive
model."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.pool import LayerShape, PageIds, PagePool
from kvcomm.memory.segments import Rendition, Segment, SegmentStore
from kvcomm.memory.tree import RadixTree

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
        self.store = SegmentStore(
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
        ttl_s: float | None = None,
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
            ttl_s=ttl_s,
        )
        self.pool.release(pages)
        self.check()
        return rendition

    def has(self, segment: Segment, **kwargs: bool) -> bool:
        return self.store.get(NS, segment, **kwargs) is not None

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


def test_the_digest_is_what_the_docstring_says() -> None:
    expected = hashlib.sha256(
        b"kvcomm segment 1\0" + struct.pack("<Q", 3) + "né".encode() + struct.pack("<3i", 1, -1, 70_000)
    ).hexdigest()
    assert Segment((1, -1, 70_000)).digest("né") == expected


def test_the_name_is_no_part_of_the_identity_but_namespace_and_tokens_are() -> None:
    assert Segment((1, 2), "a").digest("ns") == Segment((1, 2), "b").digest("ns")
    digests = {
        Segment((1, 2)).digest("ns"),
        Segment((1, 2)).digest("other"),
        Segment((2, 1)).digest("ns"),
        Segment((1, 2, 0)).digest("ns"),
        Segment(()).digest("ns"),
        # Without a length prefix, bytes could move from the namespace to the tokens.
        Segment((2,)).digest("ns\x01\0\0\0"),
    }
    assert len(digests) == 6
    with pytest.raises(OverflowError):
        Segment((2**31,)).digest("ns")


@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 2**31 - 1)), st.text(), st.text())
@settings(deadline=None)
def test_different_segments_have_different_digests(left: list[int], right: list[int], a: str, b: str) -> None:
    same = (left, a) == (right, b)
    assert (Segment(tuple(left)).digest(a) == Segment(tuple(right)).digest(b)) == same


def test_a_rendition_comes_back_as_it_was_put(bench: Bench) -> None:
    bench.now = 3.0
    put = bench.put(A, "solver", start=9, offset=1)
    bench.now = 5.0
    got = bench.store.get(NS, A)
    assert put is not None
    assert got is not None
    assert (got.digest, got.num_tokens, got.signature, got.start, got.offset) == (A.digest(NS), 4, "solver", 9, 1)
    assert (got.fidelity, got.created_s, got.used_s) == (EXACT, 3.0, 5.0)
    assert got.pages.tolist() == put.pages.tolist()
    assert bench.store.num_bytes == 2 * bench.pool.page_bytes
    assert bench.store.get(NS, B) is None
    assert bench.store.get("other", A) is None


def test_approximate_renditions_serve_only_who_allows_them(bench: Bench) -> None:
    bench.put(A, "approximated", fidelity=APPROXIMATE)
    assert bench.store.get(NS, A) is None
    assert bench.store.get(NS, A, signature="approximated") is None
    got = bench.store.get(NS, A, allow_approximate=True)
    assert got is not None
    assert got.fidelity is APPROXIMATE


def test_exact_goes_before_approximate_and_young_before_old(bench: Bench) -> None:
    def found(**kwargs: object) -> str | None:
        got = bench.store.get(NS, A, **kwargs)
        return got.signature if got is not None else None

    bench.put(A, "one")
    bench.put(A, "two")
    bench.put(A, "three", fidelity=APPROXIMATE)
    assert found() == "two"
    assert found(allow_approximate=True) == "two"
    assert found(signature="one") == "one"
    assert found() == "one"  # used last
    assert found(signature="three") is None
    assert found(signature="three", allow_approximate=True) == "three"
    assert found(allow_approximate=True) == "one"  # although an approximate one was used later
    assert found(signature="four", allow_approximate=True) is None


def test_the_same_place_holds_one_rendition_per_fidelity(bench: Bench) -> None:
    bench.put(A, start=1)
    again = bench.put(A, start=1)
    bench.put(A, start=1, fidelity=APPROXIMATE)
    bench.put(A, start=2)
    assert again is not None
    assert len(list(bench.store.renditions(NS))) == 3
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


def test_names_move_and_keep_their_segment_known(bench: Bench) -> None:
    assert bench.store.lookup(NS, "tools") is None
    digest = bench.store.name(NS, "tools", A)
    assert digest == A.digest(NS)
    assert bench.store.lookup(NS, "tools") == A
    assert bench.store.by_digest(NS, digest) == A
    assert bench.store.lookup("other", "tools") is None
    bench.store.name(NS, "tools", B)
    assert bench.store.lookup(NS, "tools") == B
    assert bench.store.by_digest(NS, digest) is None  # nothing keeps it
    bench.store.name(NS, "more", B)
    assert list(bench.store.segments(NS)) == [(B, ("more", "tools"))]
    assert bench.store.remove(NS, B)
    assert bench.store.lookup(NS, "more") is None
    assert not bench.store.remove(NS, B)


def test_a_digest_alone_is_no_hit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "digest", lambda self, namespace: "collision")
        bench.put(A)
        assert bench.has(A)
        assert not bench.has(B)
        assert not bench.store.remove(NS, B)
        with pytest.raises(AssertionError, match="two segments"):
            bench.store.name(NS, "b", B)
        bench.store.remove(NS, A)


def test_budget_at_the_limit_and_one_past_it() -> None:
    bench = Bench(max_pages=3)
    for each in (A, B, C):
        assert bench.put(each) is not None
    assert bench.has(A)
    bench.put(segment(300))
    assert [bench.has(each) for each in (A, B, C)] == [True, False, True]
    assert bench.put(segment(400, 13)) is None
    assert [bench.has(each) for each in (A, C)] == [True, True]  # what can never fit costs nobody anything
    assert bench.put(segment(400, 12)) is not None
    assert not bench.has(A)


def test_a_namespace_over_its_budget_gives_its_own(bench: Bench) -> None:
    bench.put(A, namespace="old")
    bench.put(A)
    bench.put(B)
    bench.store.set_budget(NS, 2 * bench.pool.page_bytes)
    bench.put(C)
    assert [bench.has(each) for each in (A, B, C)] == [False, True, True]
    assert bench.store.get("old", A) is not None
    bench.store.set_budget(NS, 0)
    assert [bench.has(each) for each in (A, B, C)] == [False, False, False]
    bench.store.set_budget(NS, None)
    assert bench.put(A) is not None


def test_what_does_not_fit_beside_pins_is_refused() -> None:
    bench = Bench(max_pages=2)
    bench.put(A)
    bench.put(B)
    assert bench.store.pin(NS, A)
    assert bench.put(segment(300, 8)) is None
    assert bench.has(A)
    assert bench.store.unpin(NS, A)
    assert not bench.store.unpin(NS, A)
    assert bench.put(segment(300, 8)) is not None
    assert not bench.store.pin(NS, A)


def test_time_to_live_starts_anew_with_each_use_and_ends_for_names_too() -> None:
    bench = Bench(ttl_s=10.0)
    bench.put(A)
    bench.store.name(NS, "b", B)
    bench.put(C, ttl_s=math.inf)
    bench.now = 6.0
    assert bench.has(A)
    bench.now = 10.0
    assert bench.store.lookup(NS, "b") is None
    assert bench.store.expire() == 0
    bench.now = 16.0
    assert bench.store.expire() == 1
    assert not bench.has(A)
    bench.now = 1e9
    assert bench.has(C)
    bench.check()


def test_looking_up_is_a_use_and_a_shorter_time_to_live_shortens_nothing() -> None:
    bench = Bench(ttl_s=10.0)
    bench.store.name(NS, "a", A)
    bench.store.name(NS, "b", B, ttl_s=30.0)
    bench.store.name(NS, "b", B)
    bench.now = 6.0
    assert bench.store.lookup(NS, "a") == A
    bench.now = 15.0
    assert bench.store.by_digest(NS, A.digest(NS)) == A
    bench.now = 24.0
    assert bench.store.lookup(NS, "a") == A
    assert bench.store.lookup(NS, "b") == B
    bench.check()


def test_what_a_pin_kept_above_the_budget_goes_with_it(bench: Bench) -> None:
    bench.put(A)
    bench.store.pin(NS, A)
    bench.store.set_budget(NS, 0)
    assert bench.has(A)
    bench.store.unpin(NS, A)
    assert not bench.has(A)


def test_a_pin_stops_the_clock() -> None:
    bench = Bench(ttl_s=10.0)
    bench.put(A)
    bench.store.pin(NS, A)
    bench.now = 50.0
    assert bench.has(A)
    bench.now = 100.0
    bench.store.unpin(NS, A)
    bench.now = 109.0
    bench.store.expire()
    assert len(list(bench.store.renditions(NS))) == 1
    bench.now = 110.0
    assert bench.store.expire() == 1
    bench.check()


def test_eviction_frees_pages_and_spares_those_in_use(bench: Bench) -> None:
    bench.put(A)
    bench.put(B)
    bench.put(C)
    bench.store.pin(NS, B)
    busy = bench.store.get(NS, A)
    assert busy is not None
    bench.pool.retain(busy.pages)
    bench.has(C)
    assert bench.store.evict(5) == 1
    assert [bench.has(each) for each in (A, B, C)] == [True, True, False]
    bench.pool.release(busy.pages)
    assert bench.store.evict(1) == 1
    assert [bench.has(each) for each in (A, B, C)] == [False, True, False]


def test_pages_shared_with_the_tree_can_be_had_back(bench: Bench) -> None:
    """Tree and store once passed over what the other held too, so a full pool stayed full."""
    bench.put(B)
    bench.store.pin(NS, B)
    tree = RadixTree(bench.pool)
    pages = bench.pool.allocate(1)
    tree.insert(NS, A.token_ids, pages)
    bench.store.put(NS, A, signature="s", start=0, pages=pages, offset=0, fidelity=EXACT)
    bench.pool.release(pages)
    assert (tree.evict(1), bench.store.evict(1)) == (0, 0)
    assert bench.store.drop_oldest()
    assert tree.evict(1) == 1
    assert not bench.store.drop_oldest()
    assert bench.has(B)


def test_reset_forgets_pins_and_names_of_one_namespace(bench: Bench) -> None:
    bench.put(A)
    bench.put(A, namespace="other")
    bench.store.name(NS, "a", A)
    bench.store.pin(NS, A)
    bench.store.reset(NS)
    assert bench.store.lookup(NS, "a") is None
    assert not bench.has(A)
    assert bench.store.get("other", A) is not None
    bench.store.reset()
    assert bench.pool.num_free == bench.pool.num_pages


@dataclass
class Known:
    """What the model knows of one segment."""

    ttl_s: float
    used_s: float
    names: set[str] = field(default_factory=set)
    pins: int = 0
    renditions: dict[tuple[str, int, Fidelity], float] = field(default_factory=dict)  # -> mark in its slots


Key = tuple[str, int, Fidelity]
Place = tuple[str, Segment, Key]

namespaces = st.sampled_from(["left", "right"])
segments = st.sampled_from([segment(0, 3), segment(0, 4), segment(0, 9), segment(50, 6)])
names = st.sampled_from(["tools", "role"])
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
        self.store = SegmentStore(
            self.pool, max_bytes=max_pages * self.pool.page_bytes, clock=lambda: self.now, ttl_s=ttl_s
        )
        self.known: dict[tuple[str, Segment], Known] = {}
        self.order: list[Place] = []  # the latest used last
        self.sizes: dict[Place, int] = {}
        self.budgets: dict[str, int | None] = {"left": None, "right": None}
        self.users: list[PageIds] = []
        self.next_mark = 0.0

    def pages_of(self, namespace: str | None) -> int:
        return sum(self.sizes[place] for place in self.order if namespace in (None, place[0]))

    def drop(self, place: Place) -> None:
        namespace, segment_, key = place
        self.order.remove(place)
        del self.known[(namespace, segment_)].renditions[key]

    def tidy(self) -> None:
        self.known = {k: r for k, r in self.known.items() if r.names or r.pins or r.renditions}

    def settle(self) -> None:
        for (namespace, segment_), record in list(self.known.items()):
            if not record.pins and record.used_s + record.ttl_s <= self.now:
                self.order = [p for p in self.order if p[:2] != (namespace, segment_)]
                del self.known[(namespace, segment_)]

    def fits(self, namespace: str | None, wanted: int) -> bool:
        limit = self.max_pages if namespace is None else self.budgets[namespace]
        return limit is None or self.pages_of(namespace) + wanted <= limit

    def make_room(self, namespace: str, wanted: int) -> bool:
        own = self.budgets[namespace]
        if wanted > self.max_pages or (own is not None and wanted > own):
            return False
        for scope in (namespace, None):
            for place in list(self.order):
                in_scope = scope in (None, place[0]) and not self.known[place[:2]].pins
                if in_scope and not self.fits(scope, wanted):
                    self.drop(place)
        return self.fits(namespace, wanted) and self.fits(None, wanted)

    def remember(self, namespace: str, segment_: Segment, ttl_s: float) -> Known:
        record = self.known.setdefault((namespace, segment_), Known(ttl_s, self.now))
        record.ttl_s, record.used_s = max(record.ttl_s, ttl_s), self.now
        return record

    @rule(
        namespace=namespaces,
        segment_=segments,
        signature=signatures,
        start=st.integers(0, 1),
        offset=st.integers(0, PAGE_SIZE - 1),
        fidelity=fidelities,
        ttl_s=st.none() | st.just(20.0),
    )
    def put(
        self,
        namespace: str,
        segment_: Segment,
        signature: str,
        start: int,
        offset: int,
        fidelity: Fidelity,
        ttl_s: float | None,
    ) -> None:
        num_pages = -(-(offset + len(segment_.token_ids)) // PAGE_SIZE)
        if self.pool.num_free < num_pages:
            return
        pages = self.pool.allocate(num_pages)
        self.next_mark += 1
        self.pool.keys[0][self.slots(pages)] = self.next_mark
        place = (namespace, segment_, (signature, start, fidelity))
        self.settle()
        record = self.remember(namespace, segment_, self.ttl_s if ttl_s is None else ttl_s)
        if place in self.order:
            self.drop(place)
        fits = self.make_room(namespace, num_pages)
        if fits:
            record.renditions[place[2]] = self.next_mark
            self.order.append(place)
            self.sizes[place] = num_pages
        self.tidy()
        stored = self.store.put(
            namespace,
            segment_,
            signature=signature,
            start=start,
            pages=pages,
            offset=offset,
            fidelity=fidelity,
            ttl_s=ttl_s,
        )
        assert (stored is not None) == fits
        self.pool.release(pages)

    def slots(self, pages: PageIds) -> torch.Tensor:
        return torch.from_numpy((pages[:, None].astype(np.int64) * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel())

    @rule(
        namespace=namespaces,
        segment_=segments,
        signature=st.none() | signatures,
        allow_approximate=st.booleans(),
        hold=st.booleans(),
    )
    def get(
        self, namespace: str, segment_: Segment, signature: str | None, allow_approximate: bool, hold: bool
    ) -> None:
        self.settle()
        candidates = [
            place
            for place in self.order
            if place[:2] == (namespace, segment_)
            and signature in (None, place[2][0])
            and (allow_approximate or place[2][2] is EXACT)
        ]
        exact = [place for place in candidates if place[2][2] is EXACT]
        best = (exact or candidates or [None])[-1]
        got = self.store.get(namespace, segment_, signature=signature, allow_approximate=allow_approximate)
        if best is None:
            assert got is None
            return
        assert got is not None
        assert (got.signature, got.start, got.fidelity) == best[2]
        record = self.known[(namespace, segment_)]
        assert (self.pool.keys[0][self.slots(got.pages)] == record.renditions[best[2]]).all()
        record.used_s = self.now
        self.order.remove(best)
        self.order.append(best)
        if hold:
            self.pool.retain(got.pages)
            self.users.append(got.pages)

    @rule()
    def stop_using(self) -> None:
        for pages in self.users:
            self.pool.release(pages)
        self.users = []

    @rule(namespace=namespaces, name=names, segment_=segments)
    def name(self, namespace: str, name: str, segment_: Segment) -> None:
        self.settle()
        for (owner, _), record in self.known.items():
            if owner == namespace:
                record.names.discard(name)
        self.remember(namespace, segment_, self.ttl_s).names.add(name)
        self.tidy()
        assert self.store.name(namespace, name, segment_) == segment_.digest(namespace)

    @rule(namespace=namespaces, name=names)
    def lookup(self, namespace: str, name: str) -> None:
        self.settle()
        found = [s for (owner, s), r in self.known.items() if owner == namespace and name in r.names]
        assert self.store.lookup(namespace, name) == (found[0] if found else None)
        for segment_ in found:
            self.known[(namespace, segment_)].used_s = self.now

    @rule(namespace=namespaces, segment_=segments)
    def pin(self, namespace: str, segment_: Segment) -> None:
        self.settle()
        record = self.known.get((namespace, segment_))
        assert self.store.pin(namespace, segment_) == (record is not None)
        if record is not None:
            record.pins += 1

    @rule(namespace=namespaces, segment_=segments)
    def unpin(self, namespace: str, segment_: Segment) -> None:
        record = self.known.get((namespace, segment_))
        pinned = record is not None and record.pins > 0
        assert self.store.unpin(namespace, segment_) == pinned
        if record is not None and pinned:
            record.pins -= 1
            record.used_s = self.now
            self.tidy()
            self.make_room(namespace, 0)
            self.tidy()

    @rule(namespace=namespaces, max_pages=budgets)
    def set_budget(self, namespace: str, max_pages: int | None) -> None:
        self.budgets[namespace] = max_pages
        self.make_room(namespace, 0)
        self.tidy()
        self.store.set_budget(namespace, None if max_pages is None else max_pages * self.pool.page_bytes)

    @rule(num_pages=st.integers(0, 6))
    def evict(self, num_pages: int) -> None:
        held = {page for pages in self.users for page in pages.tolist()}
        freed = 0
        pages_at = {
            (name, r.digest, (r.signature, r.start, r.fidelity)): r.pages.tolist()
            for name in self.budgets
            for r in self.store.renditions(name)
        }
        for place in list(self.order):
            pages = pages_at[(place[0], place[1].digest(place[0]), place[2])]
            free = len(set(pages) - held)
            if freed < num_pages and free and not self.known[place[:2]].pins:
                self.drop(place)
                freed += free
        self.tidy()
        assert self.store.evict(num_pages) == freed

    @rule(seconds=st.sampled_from([1.0, 4.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        free = self.pool.num_free
        self.settle()
        assert self.store.expire() == self.pool.num_free - free

    @rule(namespace=namespaces, segment_=segments)
    def remove(self, namespace: str, segment_: Segment) -> None:
        assert self.store.remove(namespace, segment_) == ((namespace, segment_) in self.known)
        self.known.pop((namespace, segment_), None)
        self.order = [place for place in self.order if place[:2] != (namespace, segment_)]

    @rule(namespace=st.none() | namespaces)
    def reset(self, namespace: str | None) -> None:
        self.store.reset(namespace)
        self.known = {k: r for k, r in self.known.items() if namespace not in (None, k[0])}
        self.order = [place for place in self.order if namespace not in (None, place[0])]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        self.pool.check_integrity(held=[*self.store.pages_held(), *self.users])
        for namespace in self.budgets:
            stored = {(r.digest, (r.signature, r.start, r.fidelity)) for r in self.store.renditions(namespace)}
            assert stored == {(s.digest(namespace), k) for name, s, k in self.order if name == namespace}
            known = {(s, names_) for s, names_ in self.store.segments(namespace)}
            assert known == {(s, tuple(sorted(r.names))) for (name, s), r in self.known.items() if name == namespace}

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.stop_using()
        self.store.reset()
        assert self.pool.allocate(24).tolist() == list(range(24))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
