"""Stretches `[start, end)` of a prompt that a rung computes in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvcomm.align.moves import Move
from kvcomm.model.attention.contract import IntArray


def computed_stretches(moves: Sequence[Move], recomputed: IntArray, num_tokens: int) -> list[tuple[int, int]]:
    """`[start, end)` of what is computed from the first move on: everything but what stays moved."""
    computed = np.ones(num_tokens, dtype=bool)
    computed[: moves[0].start] = False
    for move in moves:
        computed[move.start : move.end] = False
    computed[recomputed] = True
    return _stretches(computed)


def rung_stretches(moves: Sequence[Move], recomputed: IntArray, num_tokens: int) -> list[tuple[int, int]]:
    """`[start, end)` of what a rung computes behind a first pass: its tokens, and all behind the last move once more.

    What stands between moves stays as the first pass left it. Computing that once more, too, takes nothing off the
    divergence that would be worth its time.
    """
    computed = np.zeros(num_tokens, dtype=bool)
    computed[recomputed] = True
    computed[moves[-1].end :] = True
    return _stretches(computed)


def _stretches(computed: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], computed, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
