"""The page pool: slots of keys and values, free runs of pages, reference counts.

Owns one key and one value tensor per layer and the reference count of every page. Whoever holds a reference
may read a page; only the holder of its single reference may write it (others call `copy_page` first). The
last `release` frees it. Always holds: pages with count 0 are exactly those in the free runs, and the counts
of all others sum up to the references handed out, so `num_free == num_pages` once everybody has released.
Refuses to know what is stored in a page, for whom, and why. Not thread-safe: its owner serializes the calls.

Free pages are kept as maximal runs, not as a stack of ids: consecutive pages are read as one view.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomm.errors import PoolExhausted, PoolTooSmall

PageIds = npt.NDArray[np.int32]

_BATCH = 256  # page tables that are counted in one go
_ONE = np.int32(1)  # `ufunc.at` is fast only where values and indices need no cast


class LayerShape(NamedTuple):
    """What one layer stores per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class PagePool:
    """Fixed number of pages of `page_size` token slots, shared by reference count.

    `keys[layer]` is [num_slots, num_kv_heads, key_dim] and `values[layer]` [num_slots, num_kv_heads,
    value_dim]; the slot of a token is `page_id * page_size + offset`. Memory is not initialized, so untouched
    pages cost no RSS. Zero layers give a pool of bookkeeping only.

    Raises:
        ValueError: `num_pages` or `page_size` is below 1, or page ids would not fit int32.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= num_pages <= np.iinfo(np.int32).max or page_size < 1:
            raise ValueError(
                f"a pool needs num_pages in [1, 2**31) and page_size >= 1, not {num_pages} and {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        num_slots = num_pages * page_size
        self.keys: list[Tensor] = [
            torch.empty(num_slots, shape.num_kv_heads, shape.key_dim, dtype=dtype, device=device) for shape in layers
        ]
        self.values: list[Tensor] = [
            torch.empty(num_slots, shape.num_kv_heads, shape.value_dim, dtype=dtype, device=device) for shape in layers
        ]
        self._slot_bytes = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in layers) * dtype.itemsize
        self.bytes_copied = 0
        self._counts = np.zeros(num_pages, dtype=np.int32)
        self._free = _FreeRuns(num_pages)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self._free.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return self._slot_bytes * self.page_size

    def allocate(self, num_pages: int, *, after: int | None = None) -> PageIds:
        """Take `num_pages` free pages with reference count 1.

        The ids are consecutive whenever a free run is long enough: the run directly behind the held page
        `after` if given, else the shortest that fits. Otherwise they come in as few pieces as possible.
        Nothing is taken on failure.

        Raises:
            PoolTooSmall: the whole pool has fewer pages.
            PoolExhausted: fewer pages are free.
            ValueError: `num_pages` is negative.
        """
        if num_pages < 0:
            raise ValueError(f"cannot allocate {num_pages} pages")
        self._require_free(num_pages)
        pages = self._free.take(num_pages, after)
        self._counts[pages] = 1
        return pages

    def retain(self, pages: PageIds) -> None:
        """Add one reference per entry of `pages` (an id may occur more than once)."""
        self._require_held(pages)
        np.add.at(self._counts, pages.astype(np.intp), _ONE)

    def release(self, pages: PageIds) -> int:
        """Drop one reference per entry of `pages`; returns how many pages became free."""
        self._require_held(pages)
        indices = pages.astype(np.intp)
        np.subtract.at(self._counts, indices, _ONE)
        left = self._counts[indices]
        if left.size and int(left.min()) < 0:
            np.add.at(self._counts, indices, _ONE)
            broken = np.unique(pages[left < 0]).tolist()
            raise AssertionError(f"pages {broken} released more often than retained")
        freed = _sorted_distinct(pages[left == 0])
        self._free.give_back(freed)
        return int(freed.size)

    def refcounts(self, pages: PageIds) -> npt.NDArray[np.int32]:
        """Reference counts of `pages`, a copy; 0 means free."""
        return self._counts[pages]

    def num_held_only_by(self, references: Iterable[PageIds], enough: int) -> int:
        """How many pages would become free if all of these references (one per entry) were dropped.

        Args:
            enough: no further references are looked at once so many pages are found.
        """
        dropped, found, left = np.zeros(self.num_pages, dtype=np.int64), 0, iter(references)
        while found < enough and (some := list(islice(left, _BATCH))):
            dropped += np.bincount(np.concatenate(some), minlength=self.num_pages)
            found = int(np.count_nonzero((dropped > 0) & (dropped == self._counts)))
        return found

    def copy_page(self, page_id: int, num_tokens: int, *, after: int | None = None) -> int:
        """Copy the first `num_tokens` slots of a page, in every layer, to a newly allocated page.

        Returns the new page (reference count 1). The old one keeps its references; the caller drops its own.

        Raises:
            PoolExhausted: no page is free.
            ValueError: `num_tokens` is not in [0, page_size].
        """
        if not 0 <= num_tokens <= self.page_size:
            raise ValueError(f"cannot copy {num_tokens} tokens of a page of {self.page_size}")
        self._require_held(np.array([page_id], dtype=np.int32))
        copy = int(self.allocate(1, after=after)[0])
        source, target = page_id * self.page_size, copy * self.page_size
        try:
            for slots in (*self.keys, *self.values):
                slots[target : target + num_tokens].copy_(slots[source : source + num_tokens])
        except BaseException:
            self.release(np.array([copy], dtype=np.int32))
            raise
        self.bytes_copied += num_tokens * self._slot_bytes
        return copy

    def slots(self, pages: PageIds, num_tokens: int) -> slice | Tensor:
        """Slots of the first `num_tokens` tokens of a page table: a slice where they lie in a row, else int64
        indices."""
        used = pages[: -(-num_tokens // self.page_size)].astype(np.int64)
        if used.size and (np.diff(used) == 1).all():
            first = int(used[0]) * self.page_size
            return slice(first, first + num_tokens)
        slots = (used[:, None] * self.page_size + np.arange(self.page_size)).ravel()[:num_tokens]
        return torch.from_numpy(slots).to(self.keys[0].device)

    def check_integrity(self, held: Iterable[PageIds] | None = None) -> None:
        """Prove that free runs and counts agree and, given all references `held`, that none is lost or extra.

        Raises:
            AssertionError: with the pages and all numbers involved.
        """
        free = self._free.page_ids()
        expected = np.flatnonzero(self._counts == 0)
        assert np.array_equal(free, expected), (
            f"{free.size} pages in free runs, {expected.size} with count 0; only in one of both: "
            f"{np.setxor1d(free, expected)[:16].tolist()}"
        )
        self._free.check_integrity()
        if held is None:
            return
        references = np.zeros(self.num_pages, dtype=np.int64)
        for pages in held:
            np.add.at(references, pages.astype(np.intp), np.int64(1))
        wrong = np.flatnonzero(references != self._counts)
        examples = [(int(p), int(self._counts[p]), int(references[p])) for p in wrong[:16]]
        assert not wrong.size, (
            f"{wrong.size} of {self.num_pages} pages ({self.num_free} free) have wrong counts: "
            f"{examples} as (page, count, references held)"
        )

    def _require_free(self, num_pages: int) -> None:
        if num_pages > self.num_pages:
            raise PoolTooSmall(
                f"{num_pages} pages of {self.page_size} tokens wanted, the whole pool has {self.num_pages}; "
                "create it with more pages or shorten the request"
            )
        if num_pages > self.num_free:
            raise PoolExhausted(
                f"{num_pages} pages of {self.page_size} tokens wanted, {self.num_free} of {self.num_pages} "
                "are free; evict or release some first"
            )

    def _require_held(self, pages: PageIds) -> None:
        if not pages.size:
            return
        inside = int(pages.min()) >= 0 and int(pages.max()) < self.num_pages
        assert inside, f"page ids {pages} outside the pool of {self.num_pages}"
        free = pages[self._counts[pages] == 0]
        assert not free.size, f"pages {free[:16].tolist()} are free"


class _FreeRuns:
    """Maximal runs of free pages, found by start, by end and by length.

    Distinct lengths sum up to at most `num_pages`, so there are few of them (4,500 for ten million pages) and
    a sorted list of lengths with one bucket each finds the best fit without touching the other runs.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = 0
        self._length_at: dict[int, int] = {}  # first page of a run -> its length
        self._start_before: dict[int, int] = {}  # page behind a run -> first page of the run
        self._lengths: list[int] = []  # distinct lengths, ascending
        self._starts: dict[int, dict[int, None]] = {}  # length -> first pages, an insertion-ordered set
        self._add(0, num_pages)

    def take(self, num_pages: int, after: int | None) -> PageIds:
        """Remove `num_pages` from the free runs; the caller has checked that there are enough."""
        pieces: list[PageIds] = []
        missing = num_pages
        while missing:
            start, length = self._choose(missing, after)
            used = min(length, missing)
            self._cut_head(start, length, used)
            pieces.append(np.arange(start, start + used, dtype=np.int32))
            missing, after = missing - used, None
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)

    def give_back(self, pages: PageIds) -> None:
        """Add sorted distinct pages and merge them with their neighbors."""
        for start, length in _runs_of(pages):
            self._merge(start, length)

    def page_ids(self) -> PageIds:
        """Every free page, ascending."""
        runs = [np.arange(s, s + n, dtype=np.int32) for s, n in sorted(self._length_at.items())]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)

    def check_integrity(self) -> None:
        runs = sorted(self._length_at.items())
        assert sum(n for _, n in runs) == self.num_pages, f"{runs[:16]} do not sum up to {self.num_pages}"
        for (start, length), (following, _) in pairwise(runs):
            assert start + length < following, f"runs at {start}+{length} and {following} touch or overlap"
        assert self._start_before == {s + n: s for s, n in runs}, "the index by end disagrees with the runs"
        assert self._lengths == sorted({n for _, n in runs}), "the list of lengths disagrees with the runs"
        bucketed = {(s, n) for n, bucket in self._starts.items() for s in bucket}
        assert bucketed == set(runs), "the buckets disagree with the runs"

    def _choose(self, wanted: int, after: int | None) -> tuple[int, int]:
        """The run to take from: behind `after`, else the shortest that is long enough, else the longest."""
        if after is not None and self._length_at.get(after + 1, 0) >= wanted:
            return after + 1, self._length_at[after + 1]
        at = bisect_left(self._lengths, wanted)
        length = self._lengths[min(at, len(self._lengths) - 1)]
        return next(iter(self._starts[length])), length

    def _cut_head(self, start: int, length: int, used: int) -> None:
        self._remove(start, length)
        if used < length:
            self._add(start + used, length - used)

    def _merge(self, start: int, length: int) -> None:
        left = self._start_before.get(start)
        if left is not None:
            left_length = self._length_at[left]
            self._remove(left, left_length)
            start, length = left, left_length + length
        right_length = self._length_at.get(start + length)
        if right_length is not None:
            self._remove(start + length, right_length)
            length += right_length
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        if length not in self._starts:
            insort(self._lengths, length)
            self._starts[length] = {}
        self._starts[length][start] = None
        self.num_pages += length

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start], self._start_before[start + length]
        bucket = self._starts[length]
        del bucket[start]
        if not bucket:
            del self._starts[length], self._lengths[bisect_left(self._lengths, length)]
        self.num_pages -= length


def _runs_of(pages: PageIds) -> Iterator[tuple[int, int]]:
    """Maximal runs of consecutive ids in sorted distinct `pages`, as (first page, length)."""
    if not pages.size:
        return
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [pages.size])))
    yield from zip(pages[starts].tolist(), lengths.tolist(), strict=True)


def _sorted_distinct(pages: PageIds) -> PageIds:
    """`np.unique`, without its cost for the few hundred ids of a sequence."""
    ordered = np.sort(pages)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if ordered.size else ordered
