"""Calibration: the chosen rung against its definition, and the promise against simulations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.calibration import Calibration, Measured, Pair, pairs_needed
from kvcomm.align.ladder import Ladder, Rung
from kvcomm.errors import InvalidRequest

LADDER: Ladder = (Rung("token", 0.5), Rung("token", 0.2), Rung("token", 0.0))


def pair(divergences: Sequence[float], ladder: Ladder = LADDER) -> Pair:
    return Pair({rung: Measured(value) for rung, value in zip(ladder, divergences, strict=False)})


def calibration(rows: Sequence[Sequence[float]]) -> Calibration:
    return Calibration(LADDER[: len(rows[0])] if rows else LADDER, [pair(row) for row in rows])


def by_definition(rows: list[list[float]], epsilon: float, delta: Fraction) -> int | None:
    """The theorem, literally: the boldest rung at which (n / (n + 1)) mean loss + 1 / (n + 1) <= delta."""
    found = None
    for rung in range(len(rows[0])):
        losses = [int(any(value > epsilon for value in row[: rung + 1])) for row in rows]
        count = len(rows)
        if Fraction(count, count + 1) * Fraction(sum(losses), count) + Fraction(1, count + 1) <= delta:
            found = rung
    return found


nats = st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.06])
rows_of_three = st.lists(st.lists(nats, min_size=3, max_size=3), min_size=1, max_size=60)


@given(
    rows_of_three,
    st.sampled_from([0.0, 0.01, 0.02, 0.05]),
    st.sampled_from([Fraction(1, 40), Fraction(1, 20), Fraction(1, 10), Fraction(1, 3), Fraction(9, 10)]),
)
def test_the_rung_is_the_theorems(rows: list[list[float]], epsilon: float, delta: Fraction) -> None:
    made = calibration(rows)
    assert made.choose(epsilon, float(delta)) == by_definition(rows, epsilon, delta)
    assert made.choose(epsilon, 1 - (1 - float(delta))) == by_definition(rows, epsilon, delta)


@given(rows_of_three)
def test_asking_for_less_never_costs_more(rows: list[list[float]]) -> None:
    made = calibration(rows)
    rungs = [made.choose(epsilon, 0.1) for epsilon in (0.0, 0.01, 0.02, 0.05, 0.1)]
    rungs += [made.choose(0.1, delta) for delta in (0.2, 0.5, 0.9)]
    boldness = [-1 if rung is None else rung for rung in rungs]
    assert boldness == sorted(boldness)


@given(rows_of_three, st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_count(rows: list[list[float]], shuffled: object) -> None:
    other = rows.copy()
    shuffled.shuffle(other)  # type: ignore[attr-defined]
    assert calibration(rows).choose(0.02, 0.2) == calibration(other).choose(0.02, 0.2)


def test_a_safer_rung_that_breaks_the_bound_stops_bolder_ones() -> None:
    rows = [[0.06, 0.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]] * 17
    assert calibration(rows).choose(0.05, 0.1) is None
    assert calibration(rows).choose(0.05, 0.2) == 2


def test_exactly_epsilon_keeps_the_bound() -> None:
    assert calibration([[0.05]] * 9).choose(0.05, 0.1) == 0
    assert calibration([[math.nextafter(0.05, 1)]] * 9).choose(0.05, 0.1) is None


@pytest.mark.parametrize("delta", [0.05, 1 - 0.95, 0.1, 1 - 0.9, 0.3, 0.5, 0.75, 0.99, 1e-4])
def test_pairs_needed_is_where_something_is_first_chosen(delta: float) -> None:
    needed = pairs_needed(delta)
    assert calibration([[0.0]] * needed).choose(0.02, delta) == 0
    assert calibration([[0.0]] * (needed - 1)).choose(0.02, delta) is None


@pytest.mark.parametrize("delta", [0.05, 1 - 0.95, 0.1])
def test_half_of_delta_needs_the_pairs_that_allow_a_violation(delta: float) -> None:
    needed = pairs_needed(delta / 2)
    for count, rung in ((needed, 0), (needed - 1, None)):
        assert calibration([[1.0]] + [[0.0]] * (count - 1)).choose(0.02, delta) == rung


def test_the_numbers_of_pairs_that_people_are_told() -> None:
    assert [pairs_needed(delta) for delta in (0.1, 0.05, 1 - 0.95, 0.05 / 2, 0.6)] == [9, 19, 19, 39, 1]


@pytest.mark.parametrize("delta", [0.0, -0.045])
def test_no_pairs_keep_a_delta_of_nothing(delta: float) -> None:
    assert calibration([[0.0]] * 1000).choose(1.0, delta) is None


def test_without_pairs_nothing_is_chosen_and_there_are_no_limits() -> None:
    made = Calibration(LADDER, [])
    assert made.num_pairs == 0
    assert made.choose(1.0, 0.5) is None
    assert made.distance_limit == math.inf
    assert made.residual_limit(0) == math.inf
    assert made.predicted(0, 0.95) == math.inf


def test_an_epsilon_that_nothing_satisfies() -> None:
    assert calibration([[0.3, 0.4]] * 500).choose(0.1, 0.05) is None


def test_pairs_that_lack_a_rung_do_not_count() -> None:
    whole, part = pair([0.0, 0.0, 0.0]), pair([0.9, 0.9])
    other = pair([0.9, 0.9, 0.9], (Rung("rotate", 0.5), Rung("rotate", 0.2), Rung("rotate", 0.0)))
    made = Calibration(LADDER, [whole, part, other] * 9)
    assert made.num_pairs == 9
    assert made.choose(0.05, 0.1) == 2
    assert Calibration(LADDER[:2], [whole, part, other] * 9).num_pairs == 18


@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.05), (0.05, 0.1), (0.01, 0.3)])
@pytest.mark.parametrize("num_pairs", [9, 19, 60])
def test_the_promise_holds_over_many_draws(epsilon: float, delta: float, num_pairs: int) -> None:
    """Of pairs and a further prompt drawn alike, divergences of prompts that need not grow along the ladder."""
    generator = np.random.default_rng(5)
    num_draws, violations, accepted = 1000, 0, 0
    for _ in range(num_draws):
        base = generator.lognormal(-5.2, 0.8, size=(num_pairs + 1, 1))
        rows = base * np.array([[0.5, 1.0, 2.0]]) * generator.lognormal(0, 0.4, size=(num_pairs + 1, 3))
        rung = calibration(rows[:-1].tolist()).choose(epsilon, delta)
        if rung is not None:
            accepted += 1
            violations += int(rows[-1, rung] > epsilon)
    assert violations / num_draws <= delta + 2 * math.sqrt(delta * (1 - delta) / num_draws)
    if pairs_needed(delta) <= num_pairs:
        assert accepted > 0.3 * num_draws


def test_the_promise_is_used_up() -> None:
    """One rung, and a bound that just fits: so the share of violations is delta and not far below."""
    generator = np.random.default_rng(6)
    draws = generator.random((4000, 20))
    limits = np.sort(draws[:, :-1], axis=1)
    # The bound 1 - 0.05 of the uniform distribution: 19 pairs allow it in 0.95^19 of draws.
    accepted = [calibration(row[:, None].tolist()).choose(0.95, 0.05) is not None for row in limits]
    assert np.mean(accepted) == pytest.approx(0.95**19, abs=0.03)


def test_limits_are_conformal_quantiles() -> None:
    rung = Rung("token", 0.3)
    pairs = [
        Pair({rung: Measured(index / 100, float(index))}, {"token": index / 10, "rotate": 99.0}) for index in range(199)
    ]
    made = Calibration((rung,), pairs[::-1])
    # The one of rank ceil(200 * level), counted from 1.
    assert made.distance_limit == pytest.approx(19.7)
    assert made.residual_limit(0) == 195
    assert made.predicted(0, 0.95) == pytest.approx(1.89)


def test_of_few_values_the_largest_is_the_limit() -> None:
    rung = Rung("token", 0.3)
    made = Calibration((rung,), [Pair({rung: Measured(value, None)}, {"token": value}) for value in (0.1, 0.3, 0.2)])
    assert made.distance_limit == 0.3
    assert made.residual_limit(0) == math.inf
    assert made.predicted(0, 0.9) == 0.3


@pytest.mark.parametrize("level", [0.5, 0.9, 0.98])
def test_a_further_value_passes_the_limit_as_often_as_promised(level: float) -> None:
    generator = np.random.default_rng(7)
    rung = Rung("token", 0.0)
    passed = 0
    for _ in range(1000):
        values = generator.exponential(size=100)
        made = Calibration((rung,), [Pair({rung: Measured(float(value))}) for value in values[1:]])
        passed += values[0] <= made.predicted(0, level)
    assert passed / 1000 == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 1000))


@pytest.mark.parametrize("number", [math.nan, -0.1, math.inf])
def test_a_pair_that_is_none_is_refused(number: float) -> None:
    rung = LADDER[0]
    for measured, distances in (
        ({rung: Measured(number)}, {}),
        ({rung: Measured(0.1, number)}, {}),
        ({rung: Measured(0.1)}, {"token": number}),
    ):
        with pytest.raises(InvalidRequest, match=r"finite numbers >= 0"):
            Pair(measured, distances)
