"""Selectors: which of the moved tokens to recompute, given a share.

`influence` (ours) is what rungs use: whole segments, the most influential first. The others are for comparison: `head`
(EPIC, arXiv 2410.15332: the first tokens of every segment), `deviation` (CacheBlend, arXiv 2405.16444: the tokens whose
KV differ most in the second layer), `attention` (the tokens that the tail attends to most).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.estimators import Correction
from kvcomm.align.ladder import rung_tokens
from kvcomm.align.moves import Move, num_moved
from kvcomm.engine.replay import Case, Replayer
from kvcomm.model.attention.contract import IntArray


class Variant(NamedTuple):
    """One way to reuse a prompt, for `Engine.measure`.

    Attributes:
        estimator: "token", "paper" or "rotate".
        share: of the moved tokens that may be recomputed.
        selector: which ones: "influence", "head", "deviation" or "attention".
    """

    estimator: str
    share: float = 0.0
    selector: str = "influence"


class SelectorView(NamedTuple):
    """What a selector may look at. `order`: the moves of the case, the most influential first."""

    case: Case
    corrections: Sequence[Correction]
    replayer: Replayer
    order: Sequence[int]

    @property
    def positions(self) -> IntArray:
        """Every moved position."""
        return np.concatenate([np.arange(move.start, move.end, dtype=np.int32) for move in self.case.moves])


Selector = Callable[[SelectorView, float], IntArray]


def default_order(moves: Sequence[Move]) -> tuple[int, ...]:
    """Where nothing has been learned: the latest segment first, usually the last answer."""
    return tuple(reversed(range(len(moves))))


def _by_influence(view: SelectorView, share: float) -> IntArray:
    return rung_tokens(view.case.moves, share, view.order)


def _heads(view: SelectorView, share: float) -> IntArray:
    chosen = [
        np.arange(move.start, move.start + int(share * move.num_tokens), dtype=np.int32) for move in view.case.moves
    ]
    return np.concatenate(chosen)


def _by_deviation(view: SelectorView, share: float) -> IntArray:
    return _largest(view, share, view.replayer.deviations(view.case))


def _by_attention(view: SelectorView, share: float) -> IntArray:
    return _largest(view, share, view.replayer.attention_mass(view.case, view.corrections))


def _largest(view: SelectorView, share: float, scores: Tensor) -> IntArray:
    """The moved positions with the largest scores, [number of moved tokens], ascending."""
    count = int(share * num_moved(view.case.moves))
    chosen = torch.topk(scores, count).indices.cpu().numpy()
    return np.sort(view.positions[chosen])


SELECTORS: dict[str, Selector] = {
    "influence": _by_influence,
    "head": _heads,
    "deviation": _by_deviation,
    "attention": _by_attention,
}
