"""Which blocks a worker holds, and which a shared tier holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvcomm.lab.load.trace_file import IdArray


class PrefixCache:
    """Blocks of prompts under a bound, the least recently used dropped first, the deepest of a prompt before others.

    Whoever uses a block uses all before it, so what is held is closed under ancestors: `depth` may search by halves.

    Args:
        capacity: blocks.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used: dict[int, int] = {}  # node -> stamp of its last use
        self._order: deque[tuple[int, IdArray, int]] = deque()  # (stamp, path, how much of it may still be held)
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._used)

    def depth(self, path: Sequence[int] | IdArray) -> int:
        """Leading blocks of `path` that are held."""
        low, high = 0, len(path)
        while low < high:
            middle = (low + high) // 2
            if int(path[middle]) in self._used:
                low = middle + 1
            else:
                high = middle
        return low

    def use(self, path: IdArray) -> tuple[list[int], list[int]]:
        """Hold a path, as far as it fits, as the most recently used one. Returns blocks that came, and that went."""
        path = path[: self.capacity]
        nodes = path.tolist()
        came = nodes[self.depth(nodes) :]
        self._stamp += 1
        self._used.update(dict.fromkeys(nodes, self._stamp))
        self._order.append((self._stamp, path, len(nodes)))
        return came, self._shrink()

    def _shrink(self) -> list[int]:
        went: list[int] = []
        while len(self._used) > self.capacity:
            stamp, path, length = self._order.popleft()
            nodes = path[:length].tolist()
            while nodes and len(self._used) > self.capacity:
                node = nodes.pop()
                if self._used.get(node) == stamp:
                    del self._used[node]
                    went.append(node)
            if nodes:
                self._order.appendleft((stamp, path, len(nodes)))
        return went


class SharedTier:
    """Blocks that any worker can get, once they have been put. Nothing is ever dropped."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def depth(self, path: IdArray, now: float) -> int:
        """Leading blocks of `path` that can be had now."""
        for index, node in enumerate(path.tolist()):
            if self._since.get(node, float("inf")) > now:
                return index
        return len(path)

    def put(self, nodes: Sequence[int], at: float) -> int:
        """Put blocks, to be had from `at`. Returns how many were not there already."""
        new = [node for node in nodes if node not in self._since]
        self._since.update(dict.fromkeys(new, at))
        return len(new)
