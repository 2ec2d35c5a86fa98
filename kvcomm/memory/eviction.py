"""Giving pages of the radix tree back: least recently used, expired, over quota, reset.

Owns the queues of leaves and every way a token leaves the tree, so that counters, tombstones, events and page
references change together. Only unlocked, unpinned leaves go, from the end of their tokens, as much as is
needed. Always holds: an evictable leaf waits in the LRU queue, in its namespace's queue if that has a quota,
and in the expiry queue if it has a TTL. Refuses to know how paths are matched or inserted.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from kvcomm.memory.ages import PageAges
from kvcomm.memory.events import CacheEvent, EventKind, EventLog
from kvcomm.memory.node import NO_IDS, Drop, MissReason, Namespace, Node, preorder
from kvcomm.memory.pool import PagePool

RESET = "reset"
"""Why tokens went that somebody cleared away."""


class LeafQueue:
    """Leaves by a key that mostly grows while they wait.

    A heap whose entries are checked when they reach the top: a leaf that was used meanwhile goes back with
    its present key. So a use costs nothing here and a removal O(log n). A linked list in LRU order would pay
    on every use of every node of a path, and could not serve expiry, whose order differs from the order of
    use.
    """

    def __init__(self, key: Callable[[Node], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Node]] = []
        self._queued: dict[Node, float] = {}  # node -> key of its one valid heap entry
        self._order = itertools.count()

    def push(self, node: Node) -> None:
        """Let `node` wait; if it does already, its place moves only towards the front."""
        key = self._key(node)
        if key < self._queued.get(node, math.inf):
            self._enter(node, key)
            self._compact()

    def discard(self, node: Node) -> None:
        """Take `node` out if it waits."""
        if self._queued.pop(node, None) is not None:
            self._compact()

    def pop(self, limit: float = math.inf) -> Node | None:
        """The evictable leaf with the smallest key, if that is at most `limit`; it no longer waits."""
        while self._heap and self._heap[0][0] <= limit:
            key, _, node = heapq.heappop(self._heap)
            if self._queued.get(node) != key:
                continue
            del self._queued[node]
            if not node.is_evictable:
                continue
            present = self._key(node)
            if present == key:
                return node
            self._enter(node, present)
        return None

    def check_waiting(self, node: Node) -> None:
        queued, present = self._queued.get(node), self._key(node)
        assert queued is not None, f"[{node.start}, {node.end}) of {node.namespace.name!r} waits nowhere"
        assert queued <= present, f"[{node.start}, {node.end}) waits at {queued}, its place is {present}"

    def _enter(self, node: Node, key: float) -> None:
        self._queued[node] = key
        heapq.heappush(self._heap, (key, next(self._order), node))

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._queued) + 64:
            self._heap = [entry for entry in self._heap if self._queued.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)


class Reaper:
    """Takes tokens out of the tree and gives their page references back to the pool."""

    def __init__(self, pool: PagePool, log: EventLog, ages: PageAges, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._log = log
        self._ages = ages
        self._clock = clock
        self._lru = LeafQueue(lambda node: node.used.tick)
        self._expiry = LeafQueue(lambda node: node.expires_at_s)

    def track(self, node: Node) -> None:
        """To be called when `node` may have become evictable, or due earlier than before."""
        if not node.is_evictable:
            return
        for queue in self._queues(node):
            queue.push(node)

    def evict(self, num_pages: int, *, spare_shared: bool = True) -> int:
        """Least recently used first, until `num_pages` became free in the pool; returns how many did.

        Leaves whose pages are all held by others too are passed over: dropping them would free nothing by itself.

        Args:
            spare_shared: False: they go as well, so that their ancestors can.
        """
        freed = 0
        passed: list[Node] = []
        while freed < num_pages and (leaf := self._lru.pop()) is not None:
            keep = self._num_pages_to_keep(leaf, num_pages - freed)
            if keep == leaf.pages.size and spare_shared:
                passed.append(leaf)
            elif keep == leaf.pages.size:
                freed += self._remove(leaf, MissReason.EVICTED)
            else:
                freed += self._cut(leaf, keep, MissReason.EVICTED)
        for leaf in passed:
            self.track(leaf)
        return freed

    def shrink(self, namespace: Namespace, num_pages: int) -> None:
        """Drop the namespace's least recently used tokens until it holds `num_pages`, as far as possible."""
        assert namespace.leaves is not None, f"namespace {namespace.name!r} has no quota"
        while namespace.num_pages > num_pages and (leaf := namespace.leaves.pop()) is not None:
            over = namespace.num_pages - num_pages
            own = leaf.pages.size - leaf.num_shared_pages
            self._cut(leaf, leaf.pages.size - over if over <= own else 0, MissReason.QUOTA)

    def expire(self, now_s: float) -> int:
        """Drop every leaf whose time is over, and ancestors that thereby became such leaves; pages freed."""
        freed = 0
        while (leaf := self._expiry.pop(now_s)) is not None:
            freed += self._remove(leaf, MissReason.EXPIRED)
        return freed

    def clear(self, namespace: Namespace) -> None:
        """Drop everything that is not locked, pinned or not."""
        namespace.root.tombstones = None
        for node in reversed(list(preorder(namespace.root))):
            node.num_pins = 0
            node.tombstones = None
            if node.is_evictable:
                self._remove(node, None)

    def start_quota(self, namespace: Namespace) -> None:
        """Give the namespace a queue of its own."""
        namespace.leaves = LeafQueue(lambda node: node.used.tick)
        for node in preorder(namespace.root):
            self.track(node)

    def record(self, kind: EventKind, node: Node, start: int, reason: str | None = None) -> None:
        """Log tokens [start, node.end) of the path, if anybody listens."""
        if not self._log.recording:
            return
        self._log.record(CacheEvent(kind, node.namespace.name, start, node.path_tokens(), reason))

    def check_waiting(self, node: Node) -> None:
        """An evictable leaf waits in every queue it belongs to, nowhere behind its place."""
        for queue in self._queues(node):
            queue.check_waiting(node)

    def _queues(self, node: Node) -> Iterator[LeafQueue]:
        yield self._lru
        if node.namespace.leaves is not None:
            yield node.namespace.leaves
        if node.ttl_s != math.inf:
            yield self._expiry

    def _num_pages_to_keep(self, leaf: Node, wanted: int) -> int:
        """How many leading pages of `leaf` may stay if `wanted` pages are to become free."""
        shared = leaf.num_shared_pages
        if shared == leaf.pages.size:
            return 0
        freeable = np.flatnonzero(self._pool.refcounts(leaf.pages[shared:]) == 1)
        if not freeable.size:
            return leaf.pages.size
        return int(freeable[-min(wanted, freeable.size)]) + shared

    def _cut(self, leaf: Node, keep: int, reason: MissReason) -> int:
        if not keep:
            return self._remove(leaf, reason)
        page_size = self._pool.page_size
        end = (leaf.start // page_size + keep) * page_size
        self._account(leaf, end, leaf.pages.size - keep, reason)
        kept, dropped = leaf.tokens[: end - leaf.start], leaf.pages[keep:]
        leaf.tombstones = None
        leaf.bury(int(leaf.tokens[kept.size]), reason)
        leaf.tokens, leaf.pages = kept.copy(), leaf.pages[:keep].copy()
        self.track(leaf)
        return self._pool.release(dropped)

    def _remove(self, leaf: Node, reason: MissReason | None) -> int:
        parent = leaf.parent
        assert parent is not None, "a root cannot be removed"
        self._account(leaf, leaf.start, leaf.pages.size - leaf.num_shared_pages, reason)
        for queue in (self._lru, self._expiry, leaf.namespace.leaves):
            if queue is not None:
                queue.discard(leaf)
        first = int(leaf.tokens[0])
        del parent.children[first]
        if reason is not None:
            parent.bury(first, reason)
        pages, leaf.parent, leaf.tokens, leaf.pages = leaf.pages, None, NO_IDS, NO_IDS
        self.track(parent)
        return self._pool.release(pages)

    def _account(self, leaf: Node, start: int, num_pages: int, reason: MissReason | None) -> None:
        """Counters and event for tokens [start, end) of `leaf`, about to go with `num_pages` pages."""
        namespace, num_tokens, now_s = leaf.namespace, leaf.end - start, self._clock()
        why = reason or RESET
        self.record(EventKind.REMOVED, leaf, start, why)
        namespace.drops.append(Drop(now_s, start, num_tokens, leaf.head_from(start), why))
        self._ages.lifetime.add(now_s - leaf.born_s, num_pages)
        self._ages.idle.add(now_s - leaf.used.at_s, num_pages)
        namespace.num_tokens -= num_tokens
        namespace.num_pages -= num_pages
        if reason is not None:
            namespace.dropped_tokens[reason] += num_tokens
