"""The engine's cache without a model: the radix tree over a page pool of bookkeeping only, at a time that is told.

For evaluations that replay what came to a cache, or do to one whatever can be done. Eviction orders are by name.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvcomm.memory.events import MAX_EVENTS, EventKind
from kvcomm.memory.eviction import DEFAULT_ORDER, ORDERS
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.tree import Match, RadixTree

__all__ = ["DEFAULT_ORDER", "ORDERS", "BareCache", "CachedPrompt", "EventKind"]


class CachedPrompt(NamedTuple):
    """One prompt: its leading tokens that were cached, and seconds spent in the tree, evicting included."""

    num_found: int
    seconds: float


class BareCache:
    """A cache whose pages have slots and no KV. Not thread-safe.

    Attributes:
        tree: as an engine has one; whatever an engine does to its own may be done to it.
        num_pages: of the pool.
        now_s: the time that the tree goes by, seconds; whoever has the cache sets it.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        eviction: str = DEFAULT_ORDER,
        ttl_s: float | None = None,
        max_events: int = MAX_EVENTS,
    ) -> None:
        """Make an empty cache.

        Args:
            eviction: one of `ORDERS`.
            ttl_s: seconds that a prefix lives without being used; None: as long as there is room.
            max_events: that wait for a reader before the rest is lost.
        """
        self.now_s = 0.0
        self.num_pages = num_pages
        self._pool = PagePool([], num_pages=num_pages, page_size=page_size)
        self.tree = RadixTree(
            self._pool, clock=lambda: self.now_s, ttl_s=ttl_s, max_events=max_events, eviction=eviction
        )

    @property
    def num_held(self) -> int:
        """Pages that the tree holds."""
        return self._pool.num_pages - self._pool.num_free

    def serve(self, namespace: str, token_ids: ArrayLike, *, ttl_s: float | None = None) -> CachedPrompt:
        """Look a prompt up, and let the tree know it afterwards, as far as it fits into the pool.

        Args:
            ttl_s: seconds that it lives; None: as long as all others.
        """
        tokens = np.asarray(token_ids, dtype=np.int32)
        began_s = time.perf_counter()
        match = self.tree.match(namespace, tokens)
        matched_s = time.perf_counter()
        pages, evicting_s = self._pages_for(match, tokens.size)
        stored = tokens[: pages.size * self._pool.page_size]
        inserting_s = time.perf_counter()
        self.tree.insert(namespace, stored, pages, ttl_s=ttl_s)
        done_s = time.perf_counter()
        self._pool.release(pages)
        return CachedPrompt(match.num_tokens, matched_s - began_s + evicting_s + done_s - inserting_s)

    def check_integrity(self) -> None:
        """Prove that tree and pool agree. Raises AssertionError with numbers."""
        self.tree.check_integrity()
        self._pool.check_integrity(held=self.tree.pages_held())

    def _pages_for(self, match: Match, num_tokens: int) -> tuple[PageIds, float]:
        """The page table a sequence would have: matched whole pages shared, the rest allocated; seconds of evicting."""
        shared = match.pages[: match.num_tokens // self._pool.page_size]
        self._pool.retain(shared)
        missing, seconds = -(-num_tokens // self._pool.page_size) - shared.size, 0.0
        if missing > self._pool.num_free:
            began_s = time.perf_counter()
            self.tree.evict(missing - self._pool.num_free)
            if missing > self._pool.num_free:  # what is matched here keeps its ancestors from going
                self.tree.evict_all(missing - self._pool.num_free)
            seconds = time.perf_counter() - began_s
        allocated = self._pool.allocate(min(missing, self._pool.num_free))
        return np.concatenate([shared, allocated]), seconds
