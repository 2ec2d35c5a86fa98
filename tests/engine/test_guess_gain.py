"""Guesses are tried where they are expected to pay."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.engine.guess_gain import MAX_ROW_COST, ROW_COST, GuessGain
from kvcomm.engine.guesses import CERTAIN, MAX_MATCH


def costing(row_cost: float, num_passes: int = 30) -> GuessGain:
    """On a machine on which a row more takes so much of a pass over one row."""
    gain = GuessGain()
    for index in range(num_passes):
        rows = 1 + index % 8
        gain.passed(rows, 0.05 * (1 + row_cost * (rows - 1)))
    return gain


def test_what_a_row_more_takes_is_measured() -> None:
    assert GuessGain().row_cost == ROW_COST
    assert costing(0.3).row_cost == pytest.approx(0.3)
    assert costing(0.0).row_cost == pytest.approx(0.0, abs=1e-9)
    assert costing(3.0).row_cost == MAX_ROW_COST


def test_passes_over_one_number_of_rows_tell_nothing() -> None:
    gain = GuessGain()
    for _ in range(50):
        gain.passed(1, 0.05)
    assert gain.row_cost == ROW_COST


def test_long_repetitions_are_followed_further_than_short_ones() -> None:
    gain = costing(0.15)
    short, long = (gain.shares([(matched, 7)], 7)[0] for matched in (1, MAX_MATCH))
    assert 0 < short < long


def test_where_rows_cost_nothing_all_are_tried() -> None:
    assert costing(0.0).shares([(1, 7)], 7) == [7]


def test_what_is_certain_is_always_computed_along() -> None:
    assert costing(0.5).shares([(CERTAIN, 5)], 7) == [5]


def test_guesses_that_are_never_right_are_given_up() -> None:
    gain = costing(0.2)
    for _ in range(200):
        gain.tried(2, 3, 0)
    assert gain.shares([(2, 7)], 7) == [0]
    assert gain.shares([(1, 7)], 7) != [0]


def test_several_answers_have_equal_shares_of_equal_chances() -> None:
    shares = costing(0.0).shares([(MAX_MATCH, 7)] * 3, 5)
    assert sorted(shares) == [1, 2, 2]


@given(
    row_cost=st.sampled_from([0.02, 0.12, 0.4]),
    found=st.lists(st.tuples(st.integers(0, MAX_MATCH), st.integers(0, 3)), min_size=1, max_size=3),
    num_rows=st.integers(0, 5),
)
def test_no_other_choice_gives_more_tokens_a_second(
    row_cost: float, found: list[tuple[int, int]], num_rows: int
) -> None:
    """Against every choice there is."""
    gain = costing(row_cost)

    def rate(shares: tuple[int, ...]) -> float:
        tokens = float(len(found))
        for (matched, _), num in zip(found, shares, strict=True):
            chance = 1.0
            for index in range(num):
                chance *= gain._next_of(matched) if index else gain._first_of(matched)
                tokens += chance
        return tokens / (1 + row_cost * (len(found) + sum(shares) - 1))

    ranges = [range(num + 1) if matched else range(1) for matched, num in found]
    best = max(rate(each) for each in product(*ranges) if sum(each) <= num_rows)
    assert rate(tuple(gain.shares(found, num_rows))) == pytest.approx(best)
