"""Intervals, against known values and the equation they solve."""

from __future__ import annotations

import pytest

from kvcomm.align.intervals import violation_limit, wilson


def test_intervals() -> None:
    assert wilson(0, 0) == (0, 0, 1)
    assert wilson(3, 40) == pytest.approx((0.075, 0.02583, 0.19861), abs=1e-4)
    assert wilson(0, 40)[1] == 0
    assert wilson(40, 40)[2] == 1
    assert violation_limit(0.05, 100) == pytest.approx(0.05 + 2 * 0.021794, abs=1e-5)


def test_wilson_solves_its_equation() -> None:
    """The ends are the shares p with |x - p| = z sqrt(p (1 - p) / n)."""
    for count, total in ((0, 10), (3, 10), (99, 100)):
        value, *ends = wilson(count, total)
        for end in ends:
            assert (value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / total, abs=1e-6)
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
