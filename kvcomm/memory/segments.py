"""Segments and where their KV is kept: identity, names, renditions.

Owns the segments a namespace knows and, for each, its renditions with one page reference per page, under byte
budgets (the store's and each namespace's) with LRU, TTL and pins. A segment lives as long as it has a name, a
pin or a rendition. Always holds: a hit compares tokens, not only digests; namespaces never see each other; an
approximate rendition is returned only to callers who ask for approximation, and never becomes exact. Refuses
to know how a rendition is moved or corrected. Not thread-safe: its owner serializes the calls.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.sequences import Identity
from kvcomm.plain import Plain

if TYPE_CHECKING:
    from kvcomm.memory.pool import PageIds, PagePool

MAX_SHOWN = 8
_DOMAIN = b"kvcomm segment 1\0"


@dataclass(frozen=True)
class Segment(Plain):
    """A unit of text with an identity: its token ids, tokenized on their own. The name is for people."""

    token_ids: tuple[int, ...]
    name: str | None = None

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.token_ids[:MAX_SHOWN]))
        more = ", ..." if len(self.token_ids) > MAX_SHOWN else ""
        return f"Segment({self.name!r}, {len(self.token_ids)} tokens: {first}{more})"

    def digest(self, namespace: str) -> str:
        """Hex SHA-256 over a domain tag, the length-prefixed namespace and the ids as little-endian int32.

        Raises:
            OverflowError: a token id does not fit int32.
        """
        owner = namespace.encode()
        ids = np.array(self.token_ids, dtype="<i4").tobytes()
        return hashlib.sha256(_DOMAIN + struct.pack("<Q", len(owner)) + owner + ids).hexdigest()


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
    segment: Segment
    renditions: tuple[Rendition, ...]
    pinned: bool
    used_s: float
    due_s: float  # infinite where nothing ends it
    seen_s: float


_Key = tuple[str, int, Fidelity]  # signature, start, fidelity


@dataclass(eq=False, slots=True)
class _Record:
    """One known segment. `renditions` are in order of use, the latest last."""

    segment: Segment
    ttl_s: float
    used_s: float
    names: set[str] = field(default_factory=set)
    num_pins: int = 0
    renditions: dict[_Key, Rendition] = field(default_factory=dict)

    @property
    def due_s(self) -> float:
        return math.inf if self.num_pins else self.used_s + self.ttl_s


@dataclass(eq=False, slots=True)
class _Space:
    """One namespace."""

    name: str
    records: dict[str, _Record] = field(default_factory=dict)  # by digest
    names: dict[str, str] = field(default_factory=dict)  # name -> digest
    max_bytes: int | None = None
    num_pages: int = 0


class SegmentStore:
    """Named segments and stored renditions of every namespace.

    `max_bytes` bounds the KV bytes that all renditions refer to (a page that two renditions share counts
    twice); `ttl_s` is how long an unused segment lives unless told otherwise; None is forever.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        ttl_s: float | None = None,
    ) -> None:
        self._pool = pool
        self._max_bytes = max_bytes
        self._clock = clock
        self._ttl_s = math.inf if ttl_s is None else ttl_s
        self._spaces: dict[str, _Space] = {}
        self._order: dict[tuple[str, str, _Key], None] = {}  # (namespace, digest, key), the latest used last
        self._num_pages = 0
        self._next_due_s = math.inf  # nothing expires before

    @property
    def num_bytes(self) -> int:
        """KV bytes that all renditions refer to."""
        return self._num_pages * self._pool.page_bytes

    def name(self, namespace: str, name: str, segment: Segment, *, ttl_s: float | None = None) -> str:
        """Let `name` stand for `segment` from now on; returns the digest."""
        self.expire()
        space = self._space(namespace)
        digest = self._remember(space, segment, ttl_s)
        before = space.names.get(name)
        space.names[name] = digest
        space.records[digest].names.add(name)
        if before is not None and before != digest:
            space.records[before].names.discard(name)
            self._forget_if_unused(space, before)
        return digest

    def lookup(self, namespace: str, name: str) -> Segment | None:
        """The segment called `name`; counts as a use."""
        self.expire()
        digest = self._view(namespace).names.get(name)
        return None if digest is None else self.by_digest(namespace, digest)

    def by_digest(self, namespace: str, digest: str) -> Segment | None:
        """The known segment with this digest; counts as a use."""
        self.expire()
        record = self._view(namespace).records.get(digest)
        if record is None:
            return None
        record.used_s = self._clock()
        return record.segment

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
        ttl_s: float | None = None,
    ) -> Rendition | None:
        """Keep KV of `segment` and retain its `pages`; least recently used renditions make room.

        `num_tokens`: leading tokens it covers; None: all (the last token of an answer is often never computed). The one
        with the same signature, start and fidelity is replaced. Returns None if the new one does not fit the budget
        even so; then nothing of it is kept.

        Raises:
            ValueError: no tokens, or `pages` are not those of its tokens from slot `offset` on.
        """
        covered = len(segment.token_ids) if num_tokens is None else num_tokens
        self._require_pages(segment, covered, pages, offset)
        self.expire()
        space, key = self._space(namespace), (signature, start, fidelity)
        digest = self._remember(space, segment, ttl_s)
        self._pool.retain(pages)  # before anything is dropped: they may be the same pages
        if key in space.records[digest].renditions:
            self._drop(space, digest, key)
        if not self._make_room(space, pages.size, sparing=digest):
            self._pool.release(pages)
            self._forget_if_unused(space, digest)
            return None
        now = self._clock()
        rendition = Rendition(
            digest, covered, signature, start, pages.copy(), offset, fidelity, now, now, slot, before, risk, context
        )
        space.records[digest].renditions[key] = rendition
        self._order[(namespace, digest, key)] = None
        self._count(space, pages.size)
        return rendition

    def get(
        self,
        namespace: str,
        segment: Segment,
        *,
        signature: str | None = None,
        allow_approximate: bool = False,
    ) -> Rendition | None:
        """The best rendition of `segment` (exact before approximate, then the latest used); counts as a use.

        `signature` restricts the search to that context. Approximate ones are found only if allowed.
        """
        self.expire()
        record = self._known(namespace, segment)
        best: _Key | None = None
        for key in record.renditions if record is not None else ():
            allowed = key[2] is Fidelity.EXACT or (allow_approximate and not _is_exact(best))
            if allowed and signature in (None, key[0]):
                best = key
        return None if record is None or best is None else self._use(namespace, record, best)

    def pin(self, namespace: str, segment: Segment) -> bool:
        """Keep the segment, its names and renditions from budgets, eviction and TTL; False if it is
        unknown."""
        self.expire()
        record = self._known(namespace, segment)
        if record is None:
            return False
        record.num_pins += 1
        return True

    def unpin(self, namespace: str, segment: Segment) -> bool:
        """Undo one `pin`; its TTL begins anew. False if there is no pin."""
        record = self._known(namespace, segment)
        if record is None or not record.num_pins:
            return False
        record.num_pins -= 1
        record.used_s = self._clock()
        self._next_due_s = min(self._next_due_s, record.due_s)
        space = self._spaces[namespace]
        self._forget_if_unused(space, segment.digest(namespace))
        self._make_room(space, 0)
        return True

    def remove(self, namespace: str, segment: Segment) -> bool:
        """Forget the segment with its names, pins and renditions; False if it is unknown."""
        if self._known(namespace, segment) is None:
            return False
        self._forget(self._spaces[namespace], segment.digest(namespace))
        return True

    def reset(self, namespace: str | None = None) -> None:
        """Forget every segment of `namespace` (None: of all), pinned or not; budgets stay."""
        for space in list(self._spaces.values()):
            if namespace in (None, space.name):
                for digest in list(space.records):
                    self._forget(space, digest)

    def forget(self, namespace: str) -> None:
        """The same, and its budget."""
        self.reset(namespace)
        self._spaces.pop(namespace, None)

    def set_budget(self, namespace: str, max_bytes: int | None) -> None:
        """Limit the KV bytes that renditions of `namespace` refer to; its least recently used go first."""
        space = self._space(namespace)
        space.max_bytes = max_bytes
        self._make_room(space, 0)
        if not space.records and max_bytes is None:
            self._spaces.pop(namespace, None)

    def evict(self, num_pages: int) -> int:
        """Drop least recently used renditions until `num_pages` pages became free in the pool; returns how
        many.

        Those of pinned segments stay, and those whose pages others hold too: dropping them would free
            nothing.
        """
        freed = 0
        for namespace, digest, key in list(self._order):
            space = self._spaces[namespace]
            record = space.records[digest]
            if freed >= num_pages:
                break
            if not record.num_pins and (self._pool.refcounts(record.renditions[key].pages) == 1).any():
                freed += self._drop(space, digest, key)
                self._forget_if_unused(space, digest)
        return freed

    def evictable_pages(self) -> Iterator[PageIds]:
        """Every page reference that eviction could drop."""
        for space in self._spaces.values():
            for record in space.records.values():
                if not record.num_pins:
                    yield from (rendition.pages for rendition in record.renditions.values())

    def drop_oldest(self) -> bool:
        """Drop the least recently used rendition of an unpinned segment, even if it frees nothing; False if
        none.

        For whoever shares pages with this store, like the radix tree: each passes over what the other holds
            too.
        """
        for entry in self._order:
            if not self._spaces[entry[0]].records[entry[1]].num_pins:
                self._drop_unpinned(entry, sparing=None)
                return True
        return False

    def expire(self) -> int:
        """Forget segments that outlived their TTL; returns how many pages became free in the pool."""
        now, freed = self._clock(), 0
        if now < self._next_due_s:
            return 0
        for space in list(self._spaces.values()):
            for digest in [d for d, record in space.records.items() if record.due_s <= now]:
                freed += self._forget(space, digest)
        self._next_due_s = min(
            (record.due_s for space in self._spaces.values() for record in space.records.values()),
            default=math.inf,
        )
        return freed

    def renditions_of(self, namespace: str, segment: Segment) -> tuple[Rendition, ...]:
        """Every rendition of one segment, exact or not; counts as no use."""
        self.expire()
        record = self._known(namespace, segment)
        return () if record is None else tuple(record.renditions.values())

    def touch(self, namespace: str, rendition: Rendition) -> None:
        """Count a rendition found by `renditions_of` as used now."""
        record = self._spaces[namespace].records[rendition.digest]
        self._use(namespace, record, (rendition.signature, rendition.start, rendition.fidelity))

    def drop(self, namespace: str, rendition: Rendition) -> None:
        """Forget a rendition found by `renditions_of`, and with the last one its segment unless that is kept."""
        space = self._spaces[namespace]
        self._drop(space, rendition.digest, (rendition.signature, rendition.start, rendition.fidelity))
        self._forget_if_unused(space, rendition.digest)

    def renditions(self, namespace: str) -> Iterator[Rendition]:
        """Every rendition of `namespace`, exact or not, for views and accounts; counts as no use."""
        for record in self._view(namespace).records.values():
            yield from record.renditions.values()

    def segments(self, namespace: str) -> Iterator[tuple[Segment, tuple[str, ...]]]:
        """Every known segment of `namespace` with its names, for views; counts as no use."""
        for record in self._view(namespace).records.values():
            yield record.segment, tuple(sorted(record.names))

    def views(self, namespace: str) -> Iterator[SegmentView]:
        """Every known segment of `namespace` as others may see it; counts as no use."""
        now = self._clock()
        for digest, record in self._view(namespace).records.items():
            yield SegmentView(
                digest,
                record.segment,
                tuple(record.renditions.values()),
                record.num_pins > 0,
                record.used_s,
                record.due_s,
                now,
            )

    def pages_held(self) -> Iterable[PageIds]:
        """Every page reference of the store, for `PagePool.check_integrity`."""
        for namespace in self._spaces:
            for rendition in self.renditions(namespace):
                yield rendition.pages

    def check_integrity(self) -> None:
        """Prove that names, order and page counts agree with the records.

        Raises:
            AssertionError: with the entries or numbers that differ.
        """
        ordered: set[tuple[str, str, _Key]] = set()
        for space in self._spaces.values():
            names = {name: digest for digest, record in space.records.items() for name in record.names}
            assert names == space.names, f"{space.name!r}: names {space.names}, records say {names}"
            num_pages = sum(rendition.pages.size for rendition in self.renditions(space.name))
            assert num_pages == space.num_pages, f"{space.name!r}: {num_pages} pages, not {space.num_pages}"
            for digest, record in space.records.items():
                assert digest == record.segment.digest(space.name), f"{digest} is not the digest of its segment"
                assert record.names or record.num_pins or record.renditions, f"{digest} is kept for nothing"
                assert record.due_s >= self._next_due_s, f"{digest} is due before {self._next_due_s}"
                ordered |= {(space.name, digest, key) for key in record.renditions}
        assert ordered == self._order.keys(), f"order and records differ by {ordered ^ self._order.keys()}"
        total = sum(space.num_pages for space in self._spaces.values())
        assert total == self._num_pages, f"{total} pages, not {self._num_pages}"

    def _space(self, namespace: str) -> _Space:
        if namespace not in self._spaces:
            self._spaces[namespace] = _Space(namespace)
        return self._spaces[namespace]

    def _view(self, namespace: str) -> _Space:
        """The namespace for reading; asking about an unknown one does not make it known."""
        return self._spaces.get(namespace) or _Space(namespace)

    def _known(self, namespace: str, segment: Segment) -> _Record | None:
        record = self._view(namespace).records.get(segment.digest(namespace))
        return record if record is not None and record.segment.token_ids == segment.token_ids else None

    def _remember(self, space: _Space, segment: Segment, ttl_s: float | None) -> str:
        """Make `segment` known and used now, for at least `ttl_s`; returns its digest."""
        digest, ttl, now = segment.digest(space.name), self._ttl_s if ttl_s is None else ttl_s, self._clock()
        record = space.records.setdefault(digest, _Record(segment, ttl, now))
        assert record.segment.token_ids == segment.token_ids, f"two segments with digest {digest}"
        record.ttl_s, record.used_s = max(record.ttl_s, ttl), now
        self._next_due_s = min(self._next_due_s, record.due_s)
        return digest

    def _use(self, namespace: str, record: _Record, key: _Key) -> Rendition:
        record.used_s = self._clock()
        rendition = replace(record.renditions.pop(key), used_s=record.used_s)
        record.renditions[key] = rendition
        entry = (namespace, rendition.digest, key)
        del self._order[entry]
        self._order[entry] = None
        return rendition

    def _make_room(self, space: _Space, num_pages: int, sparing: str | None = None) -> bool:
        """Drop what is least recently used until `num_pages` more fit both budgets; False if they cannot.

        First the namespace's own, for its own budget, then anybody's for the store's. The record of `sparing`
        stays even without renditions.
        """
        limits = [self._max_bytes] if space.max_bytes is None else [space.max_bytes, self._max_bytes]
        if num_pages * self._pool.page_bytes > min(limits):
            return False
        own = self._shrink(space.num_pages + num_pages, space.max_bytes, sparing, space.name)
        return self._shrink(self._num_pages + num_pages, self._max_bytes, sparing) and own

    def _shrink(self, num_pages: int, max_bytes: int | None, sparing: str | None, namespace: str | None = None) -> bool:
        """Drop what is least recently used, of one namespace or of all, until `num_pages` are few enough for a budget.

        Looks at no more than it drops and passes over: among thousands of passages keeping one more takes no longer.
        Returns False if what is pinned leaves too many.
        """
        excess = self._num_over(num_pages, max_bytes)
        dropped = []
        for entry in self._order:
            if excess <= 0:
                break
            record = self._spaces[entry[0]].records[entry[1]]
            if namespace in (None, entry[0]) and not record.num_pins:
                dropped.append(entry)
                excess -= record.renditions[entry[2]].pages.size
        for entry in dropped:
            self._drop_unpinned(entry, sparing)
        return excess <= 0

    def _num_over(self, num_pages: int, max_bytes: int | None) -> int:
        """Pages beyond a budget."""
        if max_bytes is None or not self._pool.page_bytes:
            return 0
        return num_pages - max_bytes // self._pool.page_bytes

    def _drop_unpinned(self, entry: tuple[str, str, _Key], sparing: str | None) -> None:
        namespace, digest, key = entry
        space = self._spaces[namespace]
        if not space.records[digest].num_pins:
            self._drop(space, digest, key)
            if digest != sparing:
                self._forget_if_unused(space, digest)

    def _drop(self, space: _Space, digest: str, key: _Key) -> int:
        rendition = space.records[digest].renditions.pop(key)
        del self._order[(space.name, digest, key)]
        self._count(space, -rendition.pages.size)
        return self._pool.release(rendition.pages)

    def _count(self, space: _Space, num_pages: int) -> None:
        space.num_pages += num_pages
        self._num_pages += num_pages

    def _forget(self, space: _Space, digest: str) -> int:
        record = space.records[digest]
        freed = sum(self._drop(space, digest, key) for key in list(record.renditions))
        for name in record.names:
            del space.names[name]
        self._forget_record(space, digest)
        return freed

    def _forget_if_unused(self, space: _Space, digest: str) -> None:
        record = space.records[digest]
        if not (record.names or record.num_pins or record.renditions):
            self._forget_record(space, digest)

    def _forget_record(self, space: _Space, digest: str) -> None:
        """Forget a segment, and its namespace with the last one unless that has a budget."""
        del space.records[digest]
        if not space.records and space.max_bytes is None:
            self._spaces.pop(space.name, None)

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


def _is_exact(key: _Key | None) -> bool:
    return key is not None and key[2] is Fidelity.EXACT
