"""The best hit rate that any cache of a given size could have had on a trace.

The optimum computed here, precisely: between two requests a cache may hold at most `capacity` blocks, where a
block is a node of the trie of all prompts (its id together with everything before it). When a request
arrives, those of its blocks that are held *and whose every ancestor is held* are hits; afterwards the cache
may keep any of the blocks it held and any of the request's. The result is the largest number of hits over all
such choices, made with the whole trace known.

Why the greedy choice below (Belady's MIN, bypass allowed) reaches it: a block kept from one use to the next
earns one hit, so this is the choice of the most intervals with at most `capacity` overlapping anywhere, and
dropping the interval that ends last is optimal for that. The prefix rule then costs nothing: whoever uses a
block uses its ancestors too, so an ancestor's next use is never later, and with the deeper block dropped
first among equals what is kept is always closed under ancestors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcomm.lab.load.trace_file import IdArray, TraceRequest

Int64Array = npt.NDArray[np.int64]


def trie_paths(requests: Sequence[TraceRequest]) -> tuple[list[IdArray], int]:
    """Each request's blocks as nodes of the trie of all prompts, numbered from 0; and how many nodes there
    are."""
    numbers: dict[tuple[int, int, int], int] = {}
    latest: dict[int, tuple[IdArray, IdArray]] = {}  # per session: blocks and nodes of its last request
    paths = []
    for session, _, blocks, _ in requests:
        known_blocks, nodes = latest.get(session, (blocks[:0], blocks[:0]))
        shared = _num_equal(known_blocks, blocks)
        path = np.empty_like(blocks)
        path[:shared] = nodes[:shared]
        parent = int(path[shared - 1]) if shared else -1
        for at in range(shared, blocks.size):
            parent = numbers.setdefault((session, parent, int(blocks[at])), len(numbers))
            path[at] = parent
        latest[session] = (blocks, path)
        paths.append(path)
    return paths, len(numbers)


def next_uses(paths: Sequence[IdArray], num_nodes: int) -> list[tuple[list[int], list[int]]]:
    """For each request: the later requests that next use one of its blocks, and how many blocks each."""
    never = len(paths)
    upcoming = np.full(num_nodes, never, dtype=np.int64)
    groups: list[tuple[list[int], list[int]]] = []
    for index in range(len(paths) - 1, -1, -1):
        later: Int64Array = upcoming[paths[index]]
        users, counts = np.unique(later[later < never], return_counts=True)
        groups.append((users.tolist(), counts.tolist()))
        upcoming[paths[index]] = index
    groups.reverse()
    return groups


def most_hits(uses: Sequence[tuple[list[int], list[int]]], capacity: int) -> int:
    """The optimum in blocks for a cache of `capacity` blocks; `uses` from `next_uses`.

    Blocks that wait for the same request are alike, so only their number is kept.
    """
    waiting = [0] * len(uses)  # blocks held for this request
    latest: list[int] = []  # requests that blocks wait for, negated: the last one on top
    held = hits = 0
    for index, (users, counts) in enumerate(uses):
        hits += waiting[index]
        held -= waiting[index]
        waiting[index] = 0
        for user, count in zip(users, counts, strict=True):
            if not waiting[user]:
                heapq.heappush(latest, -user)
            waiting[user] += count
            held += count
        while held > capacity:
            user = -latest[0]
            dropped = min(waiting[user], held - capacity)
            waiting[user] -= dropped
            held -= dropped
            if not waiting[user]:
                heapq.heappop(latest)
    return hits


def _num_equal(left: IdArray, right: IdArray) -> int:
    size = min(left.size, right.size)
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size
