"""Selectors: which of the moved tokens to recompute, given a share.

`attention` is what rungs use: the most important tokens, by attention and expected error. The others are for
comparison: `influence` (whole segments, the most important first), `head` (EPIC, arXiv 2410.15332: the first tokens of
every segment), `deviation` (CacheBlend, arXiv 2405.16444: the tokens whose KV differ most in the second layer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kvcomm.align.ladder import first_tokens, top_segments, top_tokens
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.replay import Case, Replayer


class SelectorView(NamedTuple):
    """What a selector may look at. `scores`: importance of every moved token, when all of them are moved."""

    case: Case
    replayer: Replayer
    scores: Tensor


Selector = Callable[[SelectorView, float], IntArray]


def _by_attention(view: SelectorView, share: float) -> IntArray:
    return top_tokens(view.case.moves, share, view.scores)


def _by_influence(view: SelectorView, share: float) -> IntArray:
    return top_segments(view.case.moves, share, view.scores)


def _heads(view: SelectorView, share: float) -> IntArray:
    return first_tokens(view.case.moves, share)


def _by_deviation(view: SelectorView, share: float) -> IntArray:
    return top_tokens(view.case.moves, share, view.replayer.deviations(view.case))


SELECTORS: dict[str, Selector] = {
    "attention": _by_attention,
    "influence": _by_influence,
    "head": _heads,
    "deviation": _by_deviation,
}
