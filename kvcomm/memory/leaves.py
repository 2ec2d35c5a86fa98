"""Evictable leaves in the order in which they are to go: what an order offers, and the one by a key."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Protocol

from kvcomm.memory.node import Node


class LeafOrder(Protocol):
    """Leaves that wait, the one to go first at the front."""

    def push(self, node: Node) -> None:
        """Let `node` wait; if it does already, its place may have moved towards the front."""

    def discard(self, node: Node) -> None:
        """Take `node` out if it waits."""

    def pop(self) -> Node | None:
        """The evictable leaf to go first; it no longer waits."""

    def check_waiting(self, node: Node) -> None:
        """Prove that `node` waits where it is found in time; AssertionError tells where it is not."""


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

    def first(self, limit: float = math.inf) -> Node | None:
        """The evictable leaf with the smallest key, if that is at most `limit`; it goes on waiting."""
        while self._heap and self._heap[0][0] <= limit:
            key, _, node = self._heap[0]
            is_valid = self._queued.get(node) == key
            present = self._key(node)
            if is_valid and node.is_evictable and present == key:
                return node
            heapq.heappop(self._heap)
            if is_valid:
                del self._queued[node]
                if node.is_evictable:
                    self._enter(node, present)
        return None

    def pop(self, limit: float = math.inf) -> Node | None:
        """What `first` returns; it no longer waits."""
        node = self.first(limit)
        if node is not None:
            heapq.heappop(self._heap)
            del self._queued[node]
        return node

    def check_waiting(self, node: Node) -> None:
        """Prove that `node` waits, nowhere behind its place."""
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
