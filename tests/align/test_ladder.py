"""Rungs, ladders, and which tokens a rung recomputes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from kvcomm.align.edges import Edge
from kvcomm.align.ladder import (
    CORRECTED,
    DEFAULT_RUNGS,
    TURNED,
    Rung,
    first_tokens,
    ladders_of,
    moved_positions,
    top_segments,
    top_tokens,
)
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import Place
from kvcomm.align.repeats import Surroundings
from kvcomm.errors import InvalidRequest

EDGE = Edge("s", "t", "a", "a")


def move(start: int, end: int) -> Move:
    return Move(EDGE, start, end, 0, Place(slice(0, end - start), 0), np.empty(0, dtype=np.int32), Surroundings(()))


MOVES = [move(10, 14), move(20, 26), move(30, 40)]
SCORES = torch.tensor([3.0, 0, 0, 0, 1, 1, 1, 1, 1, 9, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2])


def test_every_moved_position() -> None:
    assert moved_positions(MOVES).tolist() == [*range(10, 14), *range(20, 26), *range(30, 40)]


def test_the_largest_scores_among_equals_the_earlier() -> None:
    chosen = {share: top_tokens(MOVES, share, SCORES).tolist() for share in (0.0, 0.04, 0.15, 0.25)}
    assert chosen == {0.0: [], 0.04: [], 0.15: [10, 25, 30], 0.25: [10, 20, 25, 30, 39]}


def test_whole_segments_by_mean_score_then_the_end_of_the_next() -> None:
    # Means: 0.75, 14 / 6, 0.4.
    assert top_segments(MOVES, 0.3, SCORES).tolist() == [*range(20, 26)]
    assert top_segments(MOVES, 0.4, SCORES).tolist() == [12, 13, *range(20, 26)]
    assert top_segments(MOVES, 0.99, SCORES).tolist() == [*range(10, 14), *range(20, 26), *range(31, 40)]
    assert top_segments(MOVES, 0.0, SCORES).tolist() == []


def test_a_costlier_rung_holds_all_of_a_cheaper_one() -> None:
    for select in (top_tokens, top_segments):
        rungs = [set(select(MOVES, share, SCORES).tolist()) for share in (0.1, 0.3, 0.6, 0.9)]
        assert all(low < high for low, high in pairwise(rungs))
        assert [len(rung) for rung in rungs] == [2, 6, 12, 18]


def test_the_first_tokens_of_every_segment() -> None:
    assert first_tokens(MOVES, 0.5).tolist() == [10, 11, 20, 21, 22, *range(30, 35)]
    assert first_tokens(MOVES, 0.0).tolist() == []
    assert first_tokens(MOVES, 1.0).tolist() == moved_positions(MOVES).tolist()


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InvalidRequest, match="share must be between 0 and 1"):
        Rung("token", share)


def test_rungs_say_what_they_are() -> None:
    assert str(Rung("token", 0.0)) == "token"
    assert str(Rung("rotate", 0.15)) == "rotate 15 % attention"
    assert str(Rung("rotate", 0.125, "head")) == "rotate 12.5 % head"


def test_ladders_are_the_rungs_of_one_estimator_in_their_order() -> None:
    assert ladders_of(DEFAULT_RUNGS) == (CORRECTED, TURNED)
    one, two, other = Rung("a", 0.5), Rung("a", 0.1), Rung("b")
    assert ladders_of([two, other, one, two]) == ((two, one), (other,))
    assert ladders_of([]) == ()


def test_the_default_ladders_begin_with_what_costs_most() -> None:
    for ladder in ladders_of(DEFAULT_RUNGS):
        assert [rung.share for rung in ladder] == sorted((rung.share for rung in ladder), reverse=True)
