"""The ladder: which of the moved tokens a rung recomputes.

A rung is a share of the moved tokens. What fills it is learned: whole segments, the most influential first (recomputing
a whole segment buys a lot, scattered tokens little), and with the room that is left the last tokens of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcomm.align.moves import Move, num_moved
from kvcomm.model.attention.contract import IntArray


def rung_tokens(moves: Sequence[Move], share: float, order: Sequence[int]) -> IntArray:
    """Positions that a rung recomputes, ascending.

    Args:
        share: of the moved tokens that may be recomputed.
        order: indices into `moves`, the most influential first.
    """
    room = int(share * num_moved(moves))
    chosen: list[IntArray] = []
    for index in order:
        move = moves[index]
        taken = min(room, move.num_tokens)
        chosen.append(np.arange(move.end - taken, move.end, dtype=np.int32))
        room -= taken
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int32)
