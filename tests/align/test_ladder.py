"""Which tokens a rung recomputes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kvcomm.align.edges import Edge
from kvcomm.align.ladder import rung_tokens
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import Place

EDGE = Edge("s", "t", "a", "a")


def move(start: int, end: int) -> Move:
    return Move(EDGE, start, end, 0, Place(slice(0, end - start), 0), np.empty(0, dtype=np.int32))


MOVES = [move(10, 14), move(20, 26), move(30, 40)]


@pytest.mark.parametrize(
    ("share", "order", "expected"),
    [
        (0.0, (0, 1, 2), []),
        (0.2, (0, 1, 2), [10, 11, 12, 13]),
        (0.4, (0, 1, 2), [10, 11, 12, 13, 22, 23, 24, 25]),
        (0.25, (2, 1, 0), [35, 36, 37, 38, 39]),
        (0.99, (2, 1, 0), [*range(11, 14), *range(20, 26), *range(30, 40)]),
    ],
)
def test_whole_segments_in_order_then_the_end_of_the_next(
    share: float, order: tuple[int, ...], expected: list[int]
) -> None:
    assert rung_tokens(MOVES, share, order).tolist() == expected


def test_a_costlier_rung_holds_all_of_a_cheaper_one() -> None:
    rungs = [set(rung_tokens(MOVES, share, (1, 2, 0)).tolist()) for share in (0.1, 0.3, 0.6, 0.9)]
    assert all(low < high for low, high in pairwise(rungs))
    assert [len(rung) for rung in rungs] == [2, 6, 12, 18]
