"""The ladder: which of the moved tokens a rung recomputes.

A rung is a share of the moved tokens, and it takes the most important ones (see `importance`). Costlier rungs hold all
of the cheaper ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.moves import Move, num_moved
from kvcomm.model.attention.contract import IntArray


def moved_positions(moves: Sequence[Move]) -> IntArray:
    """Every moved position, ascending."""
    return np.concatenate([np.arange(move.start, move.end, dtype=np.int32) for move in moves])


def top_tokens(moves: Sequence[Move], share: float, scores: Tensor) -> IntArray:
    """The moved positions with the largest scores, ascending.

    Args:
        share: of the moved tokens that may be recomputed.
        scores: [number of moved tokens]; among equals the earlier token is taken.
    """
    count = int(share * num_moved(moves))
    chosen = torch.sort(scores, descending=True, stable=True).indices[:count].cpu().numpy()
    return np.sort(moved_positions(moves)[chosen])


def top_segments(moves: Sequence[Move], share: float, scores: Tensor) -> IntArray:
    """Whole segments, those with the largest mean score first, and with the room left the last tokens of the next one.

    Args:
        share: of the moved tokens that may be recomputed.
        scores: [number of moved tokens].
    """
    means = [float(part.mean()) for part in scores.split([move.num_tokens for move in moves])]
    room = int(share * num_moved(moves))
    chosen: list[IntArray] = []
    for index in sorted(range(len(moves)), key=lambda index: -means[index]):
        taken = min(room, moves[index].num_tokens)
        chosen.append(np.arange(moves[index].end - taken, moves[index].end, dtype=np.int32))
        room -= taken
    return np.sort(np.concatenate(chosen))


def first_tokens(moves: Sequence[Move], share: float) -> IntArray:
    """The first tokens of every segment, a share of each, ascending."""
    chosen = [np.arange(move.start, move.start + int(share * move.num_tokens), dtype=np.int32) for move in moves]
    return np.concatenate(chosen)
