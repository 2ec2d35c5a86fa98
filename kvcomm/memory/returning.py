"""Which cached leaf is worth least: by how long one would wait until somebody asks for it again.

Eviction takes the leaf whose `Rhythm` promises the longest wait, so under pressure those go that would come back
latest, also if they were used just now, where LRU drops everybody shortly before his return. Only a path's own visits
count: what another namespace does moves nobody's rhythm. This keeps the idea of hyperbolic caching (Blankstein et al.,
ATC 2017) and LHD (Beckmann et al., NSDI 2018), that what counts is hits per time held, without what they learn from
everybody's accesses together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvcomm.memory.leaves import LeafQueue
from kvcomm.memory.node import Node
from kvcomm.memory.rhythm import Rhythm, RhythmKind


class ReturnOrder:
    """Leaves by the wait for their return, longest first; among equal waits the least recently used.

    The wait of every leaf changes all the time, but those of one `RhythmKind` stay in order of their last use. So each
    kind is a queue, and only the fronts are compared: some dozens, whatever the number of leaves. A leaf whose kind has
    changed since it was queued is noticed at the front of its old queue, where it comes at its old age at the latest.

    `clock` gives seconds, the tree's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queues: dict[RhythmKind, LeafQueue] = {}
        self._waiting: dict[Node, tuple[RhythmKind, Rhythm]] = {}  # where every leaf waits, and by which rhythm

    def push(self, node: Node) -> None:
        """Let `node` wait; if its kind has changed, where it belongs now."""
        kind = node.rhythm.kind
        if node in self._waiting and self._waiting[node][0] != kind:
            self.discard(node)
        self._waiting[node] = kind, node.rhythm
        if kind not in self._queues:
            self._queues[kind] = LeafQueue(lambda leaf: leaf.used.tick)
        self._queues[kind].push(node)

    def discard(self, node: Node) -> None:
        """Take `node` out if it waits."""
        found = self._waiting.pop(node, None)
        if found is not None and found[0] in self._queues:  # a queue that ran empty is gone
            self._queues[found[0]].discard(node)

    def pop(self) -> Node | None:
        """The evictable leaf whose return is farthest away; it no longer waits."""
        for kind in list(self._queues):
            self._settle(kind)
        now_s = self._clock()
        longest, farthest = (-math.inf, 0), None
        for kind, queue in self._queues.items():
            node = queue.first()
            assert node is not None, f"the queue of {kind} has run empty"
            wait = (kind.wait_s(now_s - node.used.at_s), -node.used.tick)
            if wait > longest:
                longest, farthest = wait, node
        if farthest is not None:
            self.discard(farthest)
        return farthest

    def check_waiting(self, node: Node) -> None:
        """Prove that `node` waits, nowhere behind its place in its queue."""
        assert node in self._waiting, f"[{node.start}, {node.end}) of {node.namespace.name!r} waits nowhere"
        self._queues[self._waiting[node][0]].check_waiting(node)

    def _settle(self, kind: RhythmKind) -> None:
        """Let those at the front of a queue that have become another kind go there; drop a queue that is empty."""
        queue = self._queues[kind]
        while (node := queue.first()) is not None:
            if self._waiting[node][1] is node.rhythm or node.rhythm.kind == kind:
                return
            self.push(node)
        del self._queues[kind]
