"""The rule of acceptance: step by step, as requests are served, and at once, as replays are judged, it is the same."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Measured, Pair
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import Grounds
from kvcomm.align.standings import Level
from kvcomm.align.watch import MAX_DEBT, Watch
from kvcomm.reuse.decision import Rungs, Served, accept, serve
from kvcomm.reuse.replay import Outcome

LADDER = (Rung("token", 0.5), Rung("token", 0.2), Rung("token", 0.0))
DELTAS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 10))

nats = st.sampled_from([0.0, 0.01, 0.02, 0.03])
far = st.sampled_from([0.0, 0.1, 0.2, 0.3])
rows = st.lists(st.tuples(st.tuples(nats, nats, nats), far, st.tuples(far, far)), max_size=14)
prompts = st.tuples(st.tuples(nats, nats, nats), far, st.tuples(far, far))
Row = tuple[tuple[float, float, float], float, tuple[float, float]]


def pair_of(row: Row) -> Pair:
    """Residuals for the rungs that compute anything."""
    divergences, distance, residuals = row
    measured = {
        rung: Measured(divergence, residual)
        for rung, divergence, residual in zip(LADDER, divergences, (*residuals, None), strict=True)
    }
    return Pair(measured, {"token": distance})


def outcomes_of(row: Row) -> list[Outcome]:
    """What replays of a prompt with 10 moved tokens gave."""
    divergences, distance, residuals = row
    found = zip(divergences, (*residuals, None), (5, 2, 0), strict=True)
    return [Outcome(divergence, 1.0, distance, residual, computed) for divergence, residual, computed in found]


def by_definition(known: list[Row], row: Row, bound: Bound, delta: Fraction) -> Served | None:
    """The rule as it is written down, with nothing of the code."""
    count = len(known)
    kept = [
        index
        for index in range(3)
        if Fraction(sum(max(each[0][: index + 1]) > bound.max_divergence for each in known) + 1, count + 1) <= delta
    ]
    if not kept:
        return None

    def limit(values: list[float], level: Fraction) -> float:
        rank = math.ceil((len(values) + 1) * level)
        return sorted(values)[min(rank, len(values)) - 1] if values else math.inf

    if row[1] > limit([each[1] for each in known], Fraction(99, 100)):
        return None
    for index in range(kept[-1], -1, -1):
        if index == 2 or row[2][index] <= limit([each[2][index] for each in known], Fraction(98, 100)):
            return Served(row[0][index], 10, 10 - (5, 2, 0)[index])
    return None


def step_by_step(grounds: Grounds, row: Row, bound: Bound) -> Served | None:
    """As an attempt asks."""
    accepted, outcomes = accept(grounds, bound), outcomes_of(row)
    if accepted is None or not accepted.is_like(outcomes[accepted.index].distance):
        return None
    while not accepted.holds(outcomes[accepted.index].residual):
        if not accepted.escalate():
            return None
    outcome = outcomes[accepted.index]
    return Served(outcome.divergence, 10, 10 - outcome.num_recomputed)


@given(rows, prompts, st.sampled_from([0.0, 0.01, 0.02]), st.sampled_from(DELTAS))
def test_serving_and_judging_replays_are_one_rule(known: list[Row], row: Row, epsilon: float, delta: Fraction) -> None:
    bound = Bound(epsilon, float(delta))
    calibration = Calibration(LADDER, [pair_of(each) for each in known])
    expected = by_definition(known, row, bound, delta)
    assert serve(calibration, Rungs(10, outcomes_of(row)), bound) == expected
    assert step_by_step(Grounds(Level.POOL, calibration, Watch(bound)), row, bound) == expected


@given(rows, st.sampled_from([0.0, 0.01, 0.02]), st.floats(0, MAX_DEBT))
def test_whoever_is_in_debt_is_served_more_carefully(known: list[Row], epsilon: float, debt: float) -> None:
    bound = Bound(epsilon, 0.5)
    calibration, watch = Calibration(LADDER, [pair_of(each) for each in known]), Watch(bound)
    before = accept(Grounds(Level.OWN, calibration, watch), bound)
    watch.debt = debt
    behind = accept(Grounds(Level.OWN, calibration, watch), bound)
    assert behind is None or (before is not None and behind.index <= before.index)
    watch.debt = MAX_DEBT
    assert accept(Grounds(Level.OWN, calibration, watch), bound) is None


def test_what_is_accepted_says_on_what_grounds() -> None:
    bound = Bound(0.02, 0.25)
    pairs = [pair_of(((0.0, 0.01, 0.01 + 0.002 * number), 0.1, (0.2, 0.3))) for number in range(7)]
    accepted = accept(Grounds(Level.PRIOR, Calibration(LADDER, pairs), Watch(bound)), bound)
    assert accepted is not None
    assert (accepted.level, accepted.num_pairs, accepted.rung, accepted.ladder) == (Level.PRIOR, 7, LADDER[2], LADDER)
    assert accepted.predicted == 0.01 + 0.002 * 5  # the 6th of 7: (7 + 1) * 0.75
    assert accepted.escalate()
    assert (accepted.rung, accepted.predicted) == (LADDER[1], 0.01)
    assert accepted.escalate()
    assert not accepted.escalate()
    assert accepted.rung == LADDER[0]
