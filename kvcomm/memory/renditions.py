"""The store of renditions: which KV of a segment is kept, computed in which context.

Owns the renditions of every namespace, with one page reference per page, under byte budgets (the store's and each
namespace's) with LRU and TTL. A segment is known as long as it has a rendition. Always holds: a hit compares tokens,
not only digests; namespaces never see each other; an approximate rendition is marked as such and never becomes exact.
Refuses to know how a rendition is moved or corrected. Not thread-safe: its owner serializes the calls, which is
asserted in each, see `lock_rule`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.lock_rule import NOT_HELD, IsHeld, unshared
from kvcomm.memory.sequences import Identity

if TYPE_CHECKING:
    from kvcomm.memory.pool import PageIds, PagePool
    from kvcomm.memory.segments import Segment


class _Key(NamedTuple):
    """What tells a rendition from the others of its segment."""

    signature: str
    start: int
    fidelity: Fidelity


@dataclass(frozen=True, eq=False, slots=True)
class Rendition:
    """One stored KV of a segment, or of its first `num_tokens` tokens.

    Its first token stands in slot `offset` of the first of `pages`, which are the store's: a caller who wants
    to use them after the next call to the store retains them.
    """

    digest: str
    num_tokens: int
    signature: str  # of the static template text before the segment
    start: int  # position of the first token where it was computed
    pages: PageIds
    offset: int
    fidelity: Fidelity
    created_s: float
    used_s: float
    slot: str = ""  # name of the segment in that context
    before: tuple[Segment, ...] = ()  # the named ones before it in that context
    risk: float = 0.0  # nats of divergence to be expected of it at most; 0 for exact KV
    context: Identity | None = None  # of the sequence that it was computed in
    identity: Identity = field(default_factory=Identity)


class SegmentView(NamedTuple):
    """A known segment and its renditions, the latest used last, as they were at `seen_s` on the store's clock."""

    digest: str
    renditions: tuple[Rendition, ...]
    used_s: float
    due_s: float  # infinite where nothing ends it
    seen_s: float


class _Place(NamedTuple):
    """Where a rendition stands."""

    namespace: str
    digest: str
    key: _Key


@dataclass(eq=False, slots=True)
class _Record:
    """One known segment. `renditions` are in order of use, the latest last, and never none."""

    token_ids: tuple[int, ...]
    used_s: float
    renditions: dict[_Key, Rendition] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Space:
    """One namespace."""

    records: dict[str, _Record] = field(default_factory=dict)  # by digest
    max_bytes: int | None = None
    num_pages: int = 0


class RenditionStore:
    """Stored renditions of every namespace.

    `max_bytes` bounds the KV bytes that all of them refer to (a page that two renditions share counts twice); `ttl_s`
    is how long a segment lives of which no rendition is used; None is forever. `is_held` says whether who calls may.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        ttl_s: float | None = None,
        is_held: IsHeld = unshared,
    ) -> None:
        self._is_held = is_held
        self._pool = pool
        self._max_bytes = max_bytes
        self._clock = clock
        self._ttl_s = math.inf if ttl_s is None else ttl_s
        self._spaces: dict[str, _Space] = {}  # those that have renditions or a budget
        self._order: dict[_Place, None] = {}  # the latest used last
        self._num_pages = 0
        self._next_due_s = math.inf  # nothing expires before

    def put(
        self,
        namespace: str,
        segment: Segment,
        *,
        signature: str,
        start: int,
        pages: PageIds,
        offset: int,
        fidelity: Fidelity,
        num_tokens: int | None = None,
        risk: float = 0.0,
        slot: str = "",
        before: tuple[Segment, ...] = (),
        context: Identity | None = None,
    ) -> Rendition | None:
        """Keep KV of `segment` and retain its `pages`; least recently used renditions make room.

        `num_tokens`: leading tokens it covers; None: all (the last token of an answer is often never computed). The one
        with the same signature, start and fidelity is replaced. Returns None if the new one does not fit the budget
        even so; then nothing of it is kept.

        Raises:
            ValueError: no tokens, or `pages` are not those of its tokens from slot `offset` on.
        """
        assert self._is_held(), NOT_HELD
        covered = len(segment.token_ids) if num_tokens is None else num_tokens
        self._require_pages(segment, covered, pages, offset)
        self.expire()
        place = _Place(namespace, segment.digest(namespace), _Key(signature, start, fidelity))
        known = self._space(namespace).records.get(place.digest)
        assert known is None or known.token_ids == segment.token_ids, f"two segments with digest {place.digest}"
        self._pool.retain(pages)  # before anything is dropped: they may be the same pages
        if place in self._order:
            self._drop(place)
        if not self._make_room(namespace, pages.size):
            self._pool.release(pages)
            return None
        now = self._clock()
        rendition = Rendition(
            place.digest,
            covered,
            signature,
            start,
            pages.copy(),
            offset,
            fidelity,
            now,
            now,
            slot,
            before,
            risk,
            context,
        )
        self._add(place, segment, rendition)
        return rendition

    def renditions_of(self, namespace: str, segment: Segment) -> tuple[Rendition, ...]:
        """Every rendition of one segment, exact or not; counts as no use."""
        assert self._is_held(), NOT_HELD
        self.expire()
        record = self._space(namespace).records.get(segment.digest(namespace))
        if record is None or record.token_ids != segment.token_ids:
            return ()
        return tuple(record.renditions.values())

    def touch(self, namespace: str, rendition: Rendition) -> None:
        """Count a rendition found by `renditions_of` as used now."""
        assert self._is_held(), NOT_HELD
        place = _place(namespace, rendition)
        record = self._spaces[namespace].records[place.digest]
        record.used_s = self._clock()
        record.renditions[place.key] = replace(record.renditions.pop(place.key), used_s=record.used_s)
        del self._order[place]
        self._order[place] = None

    def drop(self, namespace: str, rendition: Rendition) -> None:
        """Forget a rendition found by `renditions_of`."""
        assert self._is_held(), NOT_HELD
        self._drop(_place(namespace, rendition))

    def reset(self, namespace: str | None = None) -> None:
        """Forget every rendition of `namespace` (None: of all); budgets stay."""
        assert self._is_held(), NOT_HELD
        for name in list(self._spaces) if namespace is None else [namespace]:
            for digest in list(self._space(name).records):
                self._forget(name, digest)

    def forget(self, namespace: str) -> None:
        """The same, and its budget."""
        self.reset(namespace)
        self._spaces.pop(namespace, None)

    def set_budget(self, namespace: str, max_bytes: int | None) -> None:
        """Limit the KV bytes that renditions of `namespace` refer to; its least recently used go first."""
        assert self._is_held(), NOT_HELD
        self._spaces.setdefault(namespace, _Space()).max_bytes = max_bytes
        self._make_room(namespace, 0)
        self._forget_if_empty(namespace)

    def evict(self, num_pages: int) -> int:
        """Drop least recently used renditions until `num_pages` pages became free in the pool; returns how many.

        Those whose pages others hold too stay: dropping them would free nothing.
        """
        assert self._is_held(), NOT_HELD
        freed = 0
        for place in list(self._order):
            if freed >= num_pages:
                break
            if (self._pool.refcounts(self._at(place).pages) == 1).any():
                freed += self._drop(place)
        return freed

    def drop_oldest(self) -> bool:
        """Drop the least recently used rendition, even if it frees nothing; False if there is none.

        For whoever shares pages with this store, like the radix tree: each passes over what the other holds too.
        """
        assert self._is_held(), NOT_HELD
        oldest = next(iter(self._order), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def expire(self) -> int:
        """Forget segments that outlived their TTL; returns how many pages became free in the pool."""
        assert self._is_held(), NOT_HELD
        now, freed = self._clock(), 0
        if now < self._next_due_s:
            return 0
        for name, space in list(self._spaces.items()):
            for digest in [digest for digest, record in space.records.items() if self._due_s(record) <= now]:
                freed += self._forget(name, digest)
        self._next_due_s = min(
            (self._due_s(record) for space in self._spaces.values() for record in space.records.values()),
            default=math.inf,
        )
        return freed

    def views(self, namespace: str) -> Iterator[SegmentView]:
        """Every known segment of `namespace` as others may see it; counts as no use."""
        assert self._is_held(), NOT_HELD
        now = self._clock()
        for digest, record in self._space(namespace).records.items():
            yield SegmentView(digest, tuple(record.renditions.values()), record.used_s, self._due_s(record), now)

    def pages_held(self) -> Iterator[PageIds]:
        """Every page reference of the store; eviction could drop each of them."""
        assert self._is_held(), NOT_HELD
        for place in self._order:
            yield self._at(place).pages

    def check_integrity(self) -> None:
        """Prove that order and page counts agree with the records.

        Raises:
            AssertionError: with the entries or numbers that differ.
        """
        assert self._is_held(), NOT_HELD
        found: set[_Place] = set()
        for name, space in self._spaces.items():
            assert space.records or space.max_bytes is not None, f"{name!r} is kept for nothing"
            places = set()
            for digest, record in space.records.items():
                assert record.renditions, f"{digest} is kept for nothing"
                assert self._due_s(record) >= self._next_due_s, f"{digest} is due before {self._next_due_s}"
                places |= {_Place(name, digest, key) for key in record.renditions}
            num_pages = sum(self._at(place).pages.size for place in places)
            assert num_pages == space.num_pages, f"{name!r}: {num_pages} pages, not {space.num_pages}"
            found |= places
        assert found == self._order.keys(), f"order and records differ by {found ^ self._order.keys()}"
        total = sum(space.num_pages for space in self._spaces.values())
        assert total == self._num_pages, f"{total} pages, not {self._num_pages}"

    def _space(self, namespace: str) -> _Space:
        """The namespace for reading; asking about an unknown one does not make it known."""
        return self._spaces.get(namespace) or _Space()

    def _at(self, place: _Place) -> Rendition:
        return self._spaces[place.namespace].records[place.digest].renditions[place.key]

    def _due_s(self, record: _Record) -> float:
        return record.used_s + self._ttl_s

    def _add(self, place: _Place, segment: Segment, rendition: Rendition) -> None:
        space = self._spaces.setdefault(place.namespace, _Space())
        record = space.records.setdefault(place.digest, _Record(segment.token_ids, rendition.used_s))
        record.used_s = rendition.used_s
        record.renditions[place.key] = rendition
        self._order[place] = None
        self._count(space, rendition.pages.size)
        self._next_due_s = min(self._next_due_s, self._due_s(record))

    def _make_room(self, namespace: str, num_pages: int) -> bool:
        """Drop what is least recently used until `num_pages` more fit both budgets; False if they never can.

        First the namespace's own, for its own budget, then anybody's for the store's.
        """
        space = self._space(namespace)
        limits = [self._max_bytes] if space.max_bytes is None else [space.max_bytes, self._max_bytes]
        if num_pages * self._pool.page_bytes > min(limits):
            return False
        self._shrink(self._num_over(space.num_pages + num_pages, space.max_bytes), namespace)
        self._shrink(self._num_over(self._num_pages + num_pages, self._max_bytes))
        return True

    def _num_over(self, num_pages: int, max_bytes: int | None) -> int:
        """Pages beyond a budget."""
        if max_bytes is None or not self._pool.page_bytes:
            return 0
        return num_pages - max_bytes // self._pool.page_bytes

    def _shrink(self, excess: int, namespace: str | None = None) -> None:
        """Drop what is least recently used, of one namespace or of all, until it is `excess` pages less.

        Looks at no more than it drops and passes over: among thousands of passages keeping one more takes no longer.
        """
        dropped = []
        for place in self._order:
            if excess <= 0:
                break
            if namespace in (None, place.namespace):
                dropped.append(place)
                excess -= self._at(place).pages.size
        for place in dropped:
            self._drop(place)

    def _drop(self, place: _Place) -> int:
        """Forget a rendition, and with the last one its segment; returns how many pages became free."""
        space = self._spaces[place.namespace]
        record = space.records[place.digest]
        rendition = record.renditions.pop(place.key)
        del self._order[place]
        self._count(space, -rendition.pages.size)
        if not record.renditions:
            del space.records[place.digest]
            self._forget_if_empty(place.namespace)
        return self._pool.release(rendition.pages)

    def _forget(self, namespace: str, digest: str) -> int:
        keys = list(self._spaces[namespace].records[digest].renditions)
        return sum(self._drop(_Place(namespace, digest, key)) for key in keys)

    def _forget_if_empty(self, namespace: str) -> None:
        space = self._spaces[namespace]
        if not space.records and space.max_bytes is None:
            del self._spaces[namespace]

    def _count(self, space: _Space, num_pages: int) -> None:
        space.num_pages += num_pages
        self._num_pages += num_pages

    def _require_pages(self, segment: Segment, num_tokens: int, pages: PageIds, offset: int) -> None:
        page_size = self._pool.page_size
        if not segment.token_ids:
            raise ValueError("an empty segment has no rendition")
        if not 0 < num_tokens <= len(segment.token_ids):
            raise ValueError(
                f"a rendition covers 1 to {len(segment.token_ids)} tokens of this segment, not {num_tokens}"
            )
        num_pages = -(-(offset + num_tokens) // page_size)
        if not 0 <= offset < page_size or pages.size != num_pages:
            raise ValueError(
                f"{num_tokens} tokens from slot {offset} on need {num_pages} pages of {page_size} and an offset "
                f"below that, not {pages.size} pages"
            )


def _place(namespace: str, rendition: Rendition) -> _Place:
    return _Place(namespace, rendition.digest, _Key(rendition.signature, rendition.start, rendition.fidelity))
