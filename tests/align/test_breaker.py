"""The breaker: its martingale against fractions, its false alarms and its alarms by simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from kvcomm.align.breaker import Breaker


def test_the_evidence_is_a_mean_of_likelihood_ratios() -> None:
    outcomes = [True, False, False, True, False]
    breaker = Breaker(0.1)
    for outcome in outcomes:
        breaker.observe(outcome)
    rates = [Fraction(3, 20), Fraction(2, 10), Fraction(3, 10), Fraction(5, 10), Fraction(11, 20)]
    ratios = [
        math.prod((rate if each else 1 - rate) / (Fraction(1, 10) if each else Fraction(9, 10)) for each in outcomes)
        for rate in rates
    ]
    assert math.exp(breaker.log_evidence) == pytest.approx(float(sum(ratios) / len(ratios)))
    assert (breaker.num_observed, breaker.num_violations) == (5, 2)


def test_false_alarms_are_as_rare_as_promised() -> None:
    generator = np.random.default_rng(3)
    alarms = 0
    for _ in range(600):
        breaker = Breaker(0.05, alpha=0.05)
        for violated in generator.random(400) < 0.05:
            breaker.observe(bool(violated))
        alarms += breaker.tripped
    assert alarms / 600 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 600)


def test_three_times_the_rate_is_found_out() -> None:
    generator = np.random.default_rng(4)
    needed = []
    for _ in range(50):
        breaker = Breaker(0.05)
        while not breaker.tripped and breaker.num_observed < 2000:
            breaker.observe(bool(generator.random() < 0.15))
        needed.append(breaker.num_observed)
    assert np.median(needed) < 150
    assert max(needed) < 600


def test_it_trips_once_and_stays_tripped() -> None:
    breaker = Breaker(0.05)
    trips = [breaker.observe(True) for _ in range(10)]
    assert sum(trips) == 1
    for _ in range(1000):
        assert not breaker.observe(False)
    assert breaker.tripped


def test_a_million_audits_do_not_overflow() -> None:
    breaker = Breaker(0.5)
    for _ in range(200_000):
        breaker.observe(False)
    assert math.isfinite(breaker.log_evidence)
    assert not breaker.tripped
