"""The ladder: how moved text is corrected, and which of its tokens a rung computes after all.

A rung names an estimator, a chooser of tokens and the share of the moved tokens that it may take. The rungs of one
estimator form a ladder, from the safest to the boldest; each costs less than the one before it. What may be accepted is
decided along a ladder as a whole (see `calibration`), so its order is fixed before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvcomm.align.moves import Move, num_moved
from kvcomm.errors import InvalidRequest
from kvcomm.values import real_number, text

if TYPE_CHECKING:
    from torch import Tensor

    from kvcomm.model.attention.contract import IntArray

ATTENTION = "attention"


@dataclass(frozen=True)
class Rung:
    """One way to reuse moved text.

    Attributes:
        estimator: how moved KV is corrected, such as "token" or "rotate".
        share: of the moved tokens that are computed after all, in [0, 1].
        chooser: which ones.

    Raises:
        InvalidRequest: the share is no number in [0, 1], or a name is no text.
    """

    estimator: str = "token"
    share: float = 0.0
    chooser: str = ATTENTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimator", text("estimator", self.estimator))
        object.__setattr__(self, "share", real_number("share", self.share))
        object.__setattr__(self, "chooser", text("chooser", self.chooser))
        if not (math.isfinite(self.share) and 0 <= self.share <= 1):
            raise InvalidRequest(f"share must be between 0 and 1, got {self.share!r}")

    def __str__(self) -> str:
        return self.estimator if not self.share else f"{self.estimator} {100 * self.share:g} % {self.chooser}"


Ladder = tuple[Rung, ...]
"""The rungs of one estimator, the safest first."""

TURNED: Ladder = (Rung("rotate", 0.3), Rung("rotate", 0.15), Rung("rotate", 0.0))
"""Keys turned to their new places and nothing else: needs no anchors."""
CORRECTED: Ladder = (Rung("token", 0.4), Rung("token", 0.2), Rung("token", 0.1), Rung("token", 0.0))
"""With offsets of anchors."""
DEFAULT_RUNGS = (*CORRECTED, *TURNED)


def ladders_of(rungs: Sequence[Rung]) -> tuple[Ladder, ...]:
    """The rungs by estimator; ladders and rungs in the order given, each rung once."""
    names = dict.fromkeys(rung.estimator for rung in rungs)
    return tuple(tuple(rung for rung in dict.fromkeys(rungs) if rung.estimator == name) for name in names)


def moved_positions(moves: Sequence[Move]) -> IntArray:
    """Every moved position, ascending; of at least one move."""
    return np.concatenate([np.arange(move.start, move.end, dtype=np.int32) for move in moves])


def top_tokens(moves: Sequence[Move], share: float, scores: Tensor) -> IntArray:
    """The moved positions with the largest scores, ascending.

    Args:
        share: of the moved tokens that may be recomputed.
        scores: [number of moved tokens]; among equals the earlier token is taken.
    """
    count = int(share * num_moved(moves))
    chosen = scores.sort(descending=True, stable=True).indices[:count].cpu().numpy()
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
