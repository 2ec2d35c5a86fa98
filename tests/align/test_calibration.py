"""Calibration: the chosen rung against its definition, and the promise against simulations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.calibration import Calibration, Pair
from kvcomm.errors import InvalidRequest


def calibration(rows: list[list[float]]) -> Calibration:
    made = Calibration(len(rows[0]) if rows else 2)
    for row in rows:
        made.add(Pair(tuple(row), 0.3, (None,) * len(row)))
    return made


def by_definition(rows: list[list[float]], epsilon: float, delta: Fraction) -> int | None:
    """The theorem, literally: the cheapest rung all of whose costlier ones hold as well."""
    for rung in range(len(rows[0])):
        losses = sum(any(value > epsilon for value in row[rung:]) for row in rows)
        if Fraction(losses + 1, len(rows) + 1) <= delta:
            return rung
    return None


values = st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.06])


@given(
    st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.01, 0.02, 0.05]),
    st.sampled_from([Fraction(1, 20), Fraction(1, 10), Fraction(1, 3), Fraction(9, 10)]),
)
def test_the_rung_is_the_theorems(rows: list[list[float]], epsilon: float, delta: Fraction) -> None:
    assert calibration(rows).choose(epsilon, float(delta)) == by_definition(rows, epsilon, delta)


@given(st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=40))
def test_asking_for_less_never_costs_more(rows: list[list[float]]) -> None:
    made = calibration(rows)
    rungs = [made.choose(epsilon, 0.1) for epsilon in (0.0, 0.01, 0.02, 0.05, 0.1)]
    rungs += [made.choose(0.1, delta) for delta in (0.2, 0.5, 0.9)]
    costs = [2 if rung is None else rung for rung in rungs]
    assert costs == sorted(costs, reverse=True)


def test_too_few_pairs_allow_nothing() -> None:
    assert Calibration(2).choose(1.0, 0.5) is None
    assert calibration([[0.0, 0.0]] * 18).choose(0.02, 0.05) is None
    assert calibration([[0.0, 0.0]] * 19).choose(0.02, 0.05) == 0
    assert Calibration.pairs_needed(0.05) == 19
    assert Calibration.pairs_needed(1 - 0.95) == 19


def test_an_epsilon_that_nothing_satisfies() -> None:
    assert calibration([[0.3, 0.2]] * 500).choose(0.1, 0.05) is None


@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.05), (0.05, 0.1)])
def test_the_promise_holds_over_many_draws(epsilon: float, delta: float) -> None:
    generator = np.random.default_rng(5)
    violations, accepted = 0, 0
    for _ in range(1500):
        base = generator.lognormal(-5.2, 0.8, size=(61, 1))
        rows = base * np.array([[2.0, 1.0, 0.5]]) * generator.lognormal(0, 0.4, size=(61, 3))
        rung = calibration(rows[:60].tolist()).choose(epsilon, delta)
        if rung is not None:
            accepted += 1
            violations += int(rows[60, rung] > epsilon)
    assert accepted > 1000
    assert violations / 1500 <= delta + 2 * math.sqrt(delta * (1 - delta) / 1500)


def test_limits_are_conformal_quantiles() -> None:
    made = Calibration(1)
    for index in range(199):
        made.add(Pair((index / 100,), index / 10, (float(index),)))
    # ceil(200 * level) - 1 of the sorted values.
    assert made.distance_limit == pytest.approx(19.7)
    assert made.residual_limit(0) == 195
    assert made.predicted(0, 0.95) == pytest.approx(1.89)


def test_without_pairs_there_are_no_limits() -> None:
    made = Calibration(1)
    assert made.distance_limit is None
    assert made.residual_limit(0) is None
    assert made.predicted(0, 0.95) == math.inf


def test_the_oldest_pairs_go_first() -> None:
    made = Calibration(1, max_pairs=3)
    for value in (0.5, 0.1, 0.2, 0.3):
        made.add(Pair((value,), 0.0, (None,)))
    assert [pair.divergences[0] for pair in made.pairs] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "pair",
    [
        Pair((0.1,), 0.0, (None, None)),
        Pair((0.1, math.nan), 0.0, (None, None)),
        Pair((0.1, -0.1), 0.0, (None, None)),
        Pair((0.1, 0.1), math.inf, (None, None)),
        Pair((0.1, 0.1), 0.0, (None, math.nan)),
    ],
)
def test_a_pair_that_is_none_is_refused(pair: Pair) -> None:
    made = Calibration(2)
    with pytest.raises(InvalidRequest):
        made.add(pair)
    assert made.num_pairs == 0


def test_it_survives_a_file() -> None:
    made = Calibration(2, [Pair((0.1, 0.0), 0.4, (None, 0.2))])
    assert Calibration.from_json(made.to_json()).pairs == made.pairs


@pytest.mark.parametrize("value", [None, {}, {"num_rungs": 1, "pairs": [1]}, {"num_rungs": 0, "pairs": []}, [1]])
def test_a_foreign_file_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest):
        Calibration.from_json(value)
