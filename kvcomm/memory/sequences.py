"""A sequence: token ids and the page table of their KV.

A sequence holds one reference on every page in its table. What always holds: `num_computed <= num_tokens`;
the table covers at least the computed positions; slots of computed positions are never changed while another
holder shares their page, because `make_writable` first replaces every shared page that is about to be written
(copy-on-write, so a fork moves no bytes). It knows neither the tree nor requests. Not thread-safe: its owner
serializes the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvcomm.memory.fidelity import Fidelity

if TYPE_CHECKING:
    from kvcomm.memory.pool import PageIds, PagePool
    from kvcomm.model.attention.contract import IntArray


class Identity:
    """The identity of one KV, however often it is used: what is derived from it may be kept as long as this lives."""

    __slots__ = ("__weakref__",)


class KVSequence:
    """Token ids, positions 0..num_tokens-1, and the pages of the first `num_computed` of them.

    Attributes:
        num_tokens: tokens known, computed or not.
        num_computed: leading tokens whose KV is in the pages.
        num_placed: slots up to here may hold moved KV that is not counted as computed yet; a copy of a page keeps it.
        approximate_from: first position whose KV is not a cold run's; None: all of it is exact.
        identity: tells this sequence from others, forks included.
    """

    def __init__(self, pool: PagePool, token_ids: Sequence[int] | IntArray = ()) -> None:
        self._pool = pool
        self.identity = Identity()
        self._tokens = np.empty(max(64, len(token_ids)), dtype=np.int32)
        self._pages = np.empty(0, dtype=np.int32)
        self.num_tokens = 0
        self.num_computed = 0
        self.num_placed = 0
        self.approximate_from: int | None = None
        self.append(token_ids)

    @property
    def fidelity(self) -> Fidelity:
        """Approximate as soon as any of its KV is."""
        return Fidelity.EXACT if self.approximate_from is None else Fidelity.APPROXIMATE

    @property
    def num_exact(self) -> int:
        """Leading computed tokens whose KV is a cold run's."""
        return self.num_computed if self.approximate_from is None else min(self.num_computed, self.approximate_from)

    def count(self, num_computed: int) -> None:
        """The KV of the first `num_computed` tokens is in the pages now; never fewer than before, see `rewind`."""
        assert self.num_computed <= num_computed <= self.num_tokens, (self.num_computed, num_computed, self.num_tokens)
        self.num_computed = num_computed

    def place(self, start: int, num_counted: int) -> None:
        """Moved KV lies from `start` on; only `num_counted` tokens count until all is computed around it."""
        assert num_counted <= min(start, self.num_computed), (num_counted, start, self.num_computed)
        self.num_computed, self.num_placed = num_counted, self.num_tokens
        self.mark_approximate(start)

    def mark_approximate(self, start: int) -> None:
        """From `start` on the KV is not a cold run's, and nothing computed on top of it will be."""
        self.approximate_from = start if self.approximate_from is None else min(start, self.approximate_from)

    @property
    def token_ids(self) -> IntArray:
        """[num_tokens] int32, a view that must not be written."""
        return self._tokens[: self.num_tokens]

    @property
    def pages(self) -> PageIds:
        """The page table, possibly longer than needed; must not be written."""
        return self._pages

    @property
    def num_pages(self) -> int:
        """Pages held, reserved ones included."""
        return len(self._pages)

    def append(self, token_ids: Sequence[int] | IntArray) -> None:
        """Add tokens behind the last one; their KV is not computed yet."""
        needed = self.num_tokens + len(token_ids)
        if needed > len(self._tokens):
            grown = np.empty(max(needed, 2 * len(self._tokens)), dtype=np.int32)
            grown[: self.num_tokens] = self.token_ids
            self._tokens = grown
        self._tokens[self.num_tokens : needed] = token_ids
        self.num_tokens = needed

    def truncate(self, num_tokens: int) -> None:
        """Forget everything behind the first `num_tokens` tokens; pages stay until `trim`."""
        assert 0 <= num_tokens <= self.num_tokens, (num_tokens, self.num_tokens)
        self.num_tokens = num_tokens
        self.rewind(min(self.num_computed, num_tokens))

    def rewind(self, num_computed: int) -> None:
        """Treat only the first `num_computed` tokens as computed; what was approximate behind them is forgotten."""
        assert 0 <= num_computed <= self.num_computed, (num_computed, self.num_computed)
        self.num_computed = num_computed
        self.num_placed = 0
        if self.approximate_from is not None and self.approximate_from >= num_computed:
            self.approximate_from = None

    def adopt(self, pages: PageIds, num_computed: int) -> None:
        """Take over someone else's computed prefix: share `pages` for positions 0..num_computed-1.

        Pages of the own table that the prefix covers are given back; `num_computed` must not shrink.
        """
        assert self.num_computed <= num_computed <= self.num_tokens, (num_computed, self.num_tokens)
        self._pool.retain(pages)
        replaced, kept = self._pages[: len(pages)], self._pages[len(pages) :]
        self._pages = np.concatenate([pages, kept])
        self._pool.release(replaced)
        self.num_computed = num_computed

    def exchange(self, twin: KVSequence) -> None:
        """Take over the KV of a sequence with the same tokens, computed at least as far, which is left empty.

        Own pages that the twin's cover are given back; what is reserved behind them stays.
        """
        assert self.num_computed <= twin.num_computed <= self.num_tokens, (twin.num_computed, self.num_computed)
        replaced, kept = self._pages[: twin.num_pages], self._pages[twin.num_pages :]
        self._pages = np.concatenate([twin._pages, kept])
        self._pool.release(replaced)
        self.num_computed = twin.num_computed
        self.approximate_from, self.num_placed = twin.approximate_from, 0
        twin._pages = np.empty(0, dtype=np.int32)
        twin.rewind(0)

    def num_missing_pages(self, num_tokens: int) -> int:
        """Pages to allocate before positions num_computed..num_tokens-1 can be written, copies included."""
        table = self._pool_pages(num_tokens)
        first = self.num_computed // self._pool.page_size
        held = self._pages[first:table]
        shared = int((self._pool.refcounts(held) > 1).sum())
        return max(0, table - len(self._pages)) + shared

    def make_writable(self, start: int, end: int) -> None:
        """Own every page of positions [start, end): allocate missing pages, copy or replace shared ones.

        Raises:
            PoolExhausted: too few free pages; the sequence stays usable and unchanged in content.
        """
        first, last = start // self._pool.page_size, self._pool_pages(end)
        for index in range(first, min(last, len(self._pages))):
            if self._pool.refcounts(self._pages[index : index + 1])[0] > 1:
                self._replace(index)
        missing = last - len(self._pages)
        if missing > 0:
            behind = int(self._pages[-1]) if len(self._pages) else None
            self._pages = np.concatenate([self._pages, self._pool.allocate(missing, after=behind)])

    def fork(self) -> KVSequence:
        """A sequence with the same tokens that shares every computed page; no bytes are copied."""
        child = KVSequence(self._pool, self.token_ids)
        child._pages = self._pages[: self._pool_pages(self.num_computed)].copy()
        self._pool.retain(child._pages)
        child.num_computed = self.num_computed
        if self.num_exact < self.num_computed:
            child.approximate_from = self.approximate_from
        return child

    def trim(self) -> None:
        """Give back pages reserved behind the computed positions."""
        needed = self._pool_pages(self.num_computed)
        self._pages, spare = self._pages[:needed], self._pages[needed:]
        self._pool.release(spare)

    def release(self) -> None:
        """Give back every page; the tokens stay readable, nothing is computed any more. Idempotent."""
        pages, self._pages = self._pages, np.empty(0, dtype=np.int32)
        self._pool.release(pages)
        self.rewind(0)

    def check_integrity(self) -> None:
        """Raises AssertionError with the numbers if an invariant of the table is broken."""
        assert 0 <= self.num_computed <= self.num_tokens, (self.num_computed, self.num_tokens)
        assert self.approximate_from is None or self.approximate_from < self.num_tokens, (
            self.approximate_from,
            self.num_tokens,
        )
        assert len(self._pages) >= self._pool_pages(self.num_computed), (len(self._pages), self.num_computed)
        assert len(set(self._pages.tolist())) == len(self._pages), f"a page twice in {self._pages.tolist()}"
        assert (self._pool.refcounts(self._pages) > 0).all(), f"a free page in {self._pages.tolist()}"

    def _replace(self, index: int) -> None:
        """Exchange a shared page for an own one with the same computed slots."""
        num_written = max(self.num_computed, self.num_placed)
        num_kept = min(max(0, num_written - index * self._pool.page_size), self._pool.page_size)
        behind = int(self._pages[index - 1]) if index else None
        old = self._pages[index : index + 1].copy()
        self._pages[index] = self._pool.copy_page(int(old[0]), num_kept, after=behind)
        self._pool.release(old)

    def _pool_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.page_size)


def num_common(first: IntArray, second: IntArray) -> int:
    """Leading tokens that two lists of ids, each [num_tokens], have in common."""
    num = min(len(first), len(second))
    differs = first[:num] != second[:num]
    return int(differs.argmax()) if differs.any() else num
