"""All memory of an engine in one place: the pool and those that share it.

Puts pool, tree and store of renditions together for what concerns all of them: finding pages when none are free,
expiry, and the proof that every reference has an owner. What each of them holds is its own matter. Not thread-safe: its
owner serializes the calls, see `lock_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

from kvcomm.errors import PoolExhausted
from kvcomm.memory.eviction import DEFAULT_ORDER
from kvcomm.memory.lock_rule import IsHeld, unshared
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.renditions import RenditionStore
from kvcomm.memory.sequences import KVSequence
from kvcomm.memory.tree import RadixTree


class Memory:
    """One pool, its tree of exact prefixes, and the renditions of its segments.

    Attributes:
        num_resets: how often anything cached was dropped on purpose: whoever remembers something of it may forget that.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        ttl_s: float | None,
        rendition_bytes: int,
        eviction: str = DEFAULT_ORDER,
        is_held: IsHeld = unshared,
    ) -> None:
        """Make one.

        Args:
            ttl_s: how long unused prefixes and segments live; None: until their pages are needed.
            rendition_bytes: of KV that renditions may refer to.
            eviction: the policy by which prefixes go when pages are needed, see `RadixTree`.
            is_held: says whether who calls may, in the tree and the store of renditions.
        """
        self.pool = pool
        self.num_resets = 0
        self.tree = RadixTree(pool, ttl_s=ttl_s, eviction=eviction, is_held=is_held)
        self.renditions = RenditionStore(pool, max_bytes=rendition_bytes, ttl_s=ttl_s, is_held=is_held)

    def make_writable(self, sequence: KVSequence, start: int, end: int) -> None:
        """`KVSequence.make_writable`, evicting what is only cached when pages run out.

        Raises:
            PoolExhausted: even without anything cached too few pages would be free; then nothing is dropped.
        """
        self.make_room(sequence.num_missing_pages(end))
        sequence.make_writable(start, end)

    def make_room(self, num_pages: int) -> None:
        """Evict until `num_pages` pages are free.

        Raises:
            PoolExhausted: even without anything cached there would be fewer; then nothing is dropped.
        """
        self.require_possible(num_pages)
        if self._evict(num_pages, self.tree.evict) or self._evict(num_pages, self.renditions.evict):
            return
        # A page that both hold is passed over by each; it comes free only when both let go.
        while self.renditions.drop_oldest():
            if self._evict(num_pages, self.tree.evict):
                return
        self._evict(num_pages, self.tree.evict_all)

    def require_possible(self, num_pages: int, droppable: Iterable[PageIds] = ()) -> None:
        """Raises PoolExhausted unless dropping everything cached makes `num_pages` pages free.

        Args:
            droppable: further page references that can be given up.
        """
        if num_pages <= self.pool.num_free:
            return
        missing = num_pages - self.pool.num_free
        references = chain(self.tree.evictable_pages(), self.renditions.pages_held(), droppable)
        num_evictable = self.pool.num_held_only_by(references, missing)
        if missing > num_evictable:
            raise PoolExhausted(
                f"{num_pages} pages are needed, {self.pool.num_free} of {self.pool.num_pages} are free and "
                f"{num_evictable} more only cached; the others are in use"
            )

    def _evict(self, num_pages: int, evict: Callable[[int], int]) -> bool:
        """Evict in one way until `num_pages` are free, as far as it goes; whether they are."""
        missing = num_pages - self.pool.num_free
        return missing <= 0 or evict(missing) >= missing

    def expire(self) -> None:
        """Drop what outlived its TTL."""
        self.tree.expire()
        self.renditions.expire()

    def reset(self, namespace: str | None = None) -> None:
        """Drop everything cached, of one namespace or of all."""
        self.num_resets += 1
        self.tree.reset(namespace)
        self.renditions.reset(namespace)

    def check_integrity(self, held: Iterable[PageIds]) -> None:
        """Prove that the pages `held` by others, the tree's and the renditions' are all references there are.

        Raises:
            AssertionError: with all the numbers.
        """
        self.tree.check_integrity()
        self.renditions.check_integrity()
        self.pool.check_integrity([*held, *self.tree.pages_held(), *self.renditions.pages_held()])
