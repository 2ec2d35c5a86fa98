"""The optimum against an exhaustive search over everything a cache could keep."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.optimum import most_hits, next_uses, trie_paths
from kvcomm.lab.load.trace_file import TraceRequest

prompts = st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=6)


def requests(prompts_: list[list[int]], sessions: list[int] | None = None) -> list[TraceRequest]:
    return [
        TraceRequest(0 if sessions is None else sessions[at], float(at), np.array(blocks, dtype=np.int32))
        for at, blocks in enumerate(prompts_)
    ]


def optimum(prompts_: list[list[int]], capacity: int) -> int:
    paths, num_nodes = trie_paths(requests(prompts_))
    return most_hits(next_uses(paths, num_nodes), capacity)


def exhaustive(prompts_: list[list[int]], capacity: int) -> int:
    """Most hits over every choice of what to keep after every request; a hit needs its whole prefix."""
    best: dict[frozenset[tuple[int, ...]], int] = {frozenset(): 0}
    for prompt in prompts_:
        path = [tuple(prompt[: n + 1]) for n in range(len(prompt))]
        after: dict[frozenset[tuple[int, ...]], int] = {}
        for cached, hits in best.items():
            found = next((n for n, node in enumerate(path) if node not in cached), len(path))
            pool = sorted(cached | set(path))
            for size in range(min(capacity, len(pool)) + 1):
                for kept in combinations(pool, size):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, 0), hits + found)
        best = after
    return max(best.values())


@given(prompts, st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_nothing_does_better_and_something_does_as_well(prompts_: list[list[int]], capacity: int) -> None:
    assert optimum(prompts_, capacity) == exhaustive(prompts_, capacity)


def test_by_hand() -> None:
    trace = [[0, 1], [0, 2], [0, 1], [3], [0, 1]]
    assert [optimum(trace, capacity) for capacity in (0, 1, 2, 100)] == [0, 3, 5, 5]


def test_paths_are_told_apart_by_prefix_and_session() -> None:
    paths, num_nodes = trie_paths(requests([[5, 6], [6], [5, 6, 7], [5, 6]], sessions=[0, 0, 0, 1]))
    assert [path.tolist() for path in paths] == [[0, 1], [2], [0, 1, 3], [4, 5]]
    assert num_nodes == 6


def test_next_uses_count_blocks_by_their_next_reader() -> None:
    paths, num_nodes = trie_paths(requests([[0, 1, 2], [0], [0, 1]]))
    assert next_uses(paths, num_nodes) == [([1, 2], [1, 1]), ([2], [1]), ([], [])]
