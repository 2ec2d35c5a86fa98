"""Giving pages of the radix tree back: evicted, expired, over quota, reset.

Owns the orders of leaves and every way a token leaves the tree, so that counters, tombstones, events and page
references change together. Only unpinned leaves go, from the end of their tokens, as much as is
needed. Always holds: an evictable leaf waits in the order of eviction, in its namespace's own if that has a quota,
and in the expiry queue if it has a TTL. Refuses to know how paths are matched or inserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from kvcomm.config import EVICTION_POLICIES
from kvcomm.memory.ages import PageAges
from kvcomm.memory.events import CacheEvent, EventKind, EventLog
from kvcomm.memory.leaves import LeafOrder, LeafQueue
from kvcomm.memory.node import NO_IDS, Drop, MissReason, Namespace, Node, preorder
from kvcomm.memory.pool import PagePool
from kvcomm.memory.returning import ReturnOrder

RESET = "reset"
"""Why tokens went that somebody cleared away."""


ORDERS: Mapping[str, Callable[[Callable[[], float]], LeafOrder]] = dict(
    zip(EVICTION_POLICIES, (lambda _: LeafQueue(lambda node: node.used.tick), ReturnOrder), strict=True)
)
"""The order in which leaves go, by the name of the policy; each is made with the tree's clock."""

DEFAULT_ORDER = EVICTION_POLICIES[0]
"""The name in `ORDERS` that is taken where none is given."""


class Reaper:
    """Takes tokens out of the tree and gives their page references back to the pool.

    Args:
        order: the name of the policy by which leaves are evicted, one of `ORDERS`.

    Raises:
        ValueError: there is no such policy.
    """

    def __init__(
        self, pool: PagePool, log: EventLog, ages: PageAges, clock: Callable[[], float], order: str = DEFAULT_ORDER
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"there is no eviction policy {order!r}; known: {', '.join(ORDERS)}")
        self._pool = pool
        self._log = log
        self._ages = ages
        self._clock = clock
        self._new_order = ORDERS[order]
        self._order = self._new_order(clock)
        self._expiry = LeafQueue(lambda node: node.expires_at_s)
        self._with_quota: dict[Namespace, LeafOrder] = {}  # each one's own leaves, in the order of the policy

    def track(self, node: Node) -> None:
        """To be called when `node` may have become evictable, or due earlier than before."""
        if not node.is_evictable:
            return
        for order in self._orders(node):
            order.push(node)

    def evict(self, num_pages: int, *, spare_shared: bool = True) -> int:
        """In the order of the policy, until `num_pages` became free in the pool; returns how many did.

        Leaves whose pages are all held by others too are passed over: dropping them would free nothing by itself.

        Args:
            spare_shared: False: they go as well, so that their ancestors can.
        """
        freed = 0
        passed: list[Node] = []
        while freed < num_pages and (leaf := self._order.pop()) is not None:
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
        """Drop the namespace's own tokens, in the policy's order, until it holds `num_pages`, as far as possible."""
        assert namespace in self._with_quota, f"namespace {namespace.name!r} has no quota"
        leaves = self._with_quota[namespace]
        while namespace.num_pages > num_pages and (leaf := leaves.pop()) is not None:
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
        """Drop everything, pinned or not."""
        namespace.root.tombstones = None
        for node in reversed(list(preorder(namespace.root))):
            node.num_pins = 0
            node.tombstones = None
            self._remove(node, None)

    def start_quota(self, namespace: Namespace) -> None:
        """Give the namespace an order of its own."""
        self._with_quota[namespace] = self._new_order(self._clock)
        for node in preorder(namespace.root):
            self.track(node)

    def end_quota(self, namespace: Namespace) -> None:
        """Its leaves wait among all others only."""
        self._with_quota.pop(namespace, None)

    def record(self, kind: EventKind, node: Node, start: int, reason: str | None = None) -> None:
        """Log tokens [start, node.end) of the path, if anybody listens."""
        if not self._log.recording:
            return
        self._log.record(CacheEvent(kind, node.namespace.name, start, node.path_tokens(), reason))

    def check_waiting(self, node: Node) -> None:
        """An evictable leaf waits in every order it belongs to, nowhere behind its place."""
        for order in self._orders(node):
            order.check_waiting(node)

    def _orders(self, node: Node) -> Iterator[LeafOrder]:
        yield self._order
        if node.namespace in self._with_quota:
            yield self._with_quota[node.namespace]
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
        leaf.bury(int(leaf.tokens[kept.size]), reason, leaf)
        leaf.tokens, leaf.pages = kept.copy(), leaf.pages[:keep].copy()
        self.track(leaf)
        return self._pool.release(dropped)

    def _remove(self, leaf: Node, reason: MissReason | None) -> int:
        parent = leaf.parent
        assert parent is not None, "a root cannot be removed"
        self._account(leaf, leaf.start, leaf.pages.size - leaf.num_shared_pages, reason)
        for order in (self._order, self._expiry, self._with_quota.get(leaf.namespace)):
            if order is not None:
                order.discard(leaf)
        first = int(leaf.tokens[0])
        del parent.children[first]
        if reason is not None:
            parent.bury(first, reason, leaf)
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
