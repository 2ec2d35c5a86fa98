"""Lines through measurements, against numpy's weighted least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.engine.fading_line import FADING, FadingLine

POINTS = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 10)), min_size=6, max_size=60)


@given(points=POINTS)
def test_it_is_the_weighted_least_squares(points: list[tuple[int, float]]) -> None:
    line = FadingLine()
    for x, y in points:
        line.add(x, y)
    found = line.fit(min_variance=1.0)
    if found is None:
        return
    weights = FADING ** np.arange(len(points))[::-1]
    xs, ys = np.array(points, dtype=np.float64).T
    slope, offset = np.polyfit(xs, ys, 1, w=np.sqrt(weights))
    assert found == pytest.approx((offset, slope), rel=1e-6, abs=1e-6)


def test_there_is_none_through_points_at_one_place() -> None:
    line = FadingLine()
    for _ in range(100):
        line.add(16, 0.1)
    assert line.fit(min_variance=1.0) is None
    line.add(48, 0.2)
    assert line.fit(min_variance=1.0) is not None


def test_there_is_none_through_too_few() -> None:
    line = FadingLine()
    for x in (1, 100, 1, 100):
        assert line.fit(min_variance=1.0) is None
        line.add(x, 1.0)


def test_older_measurements_are_forgotten() -> None:
    line = FadingLine()
    for slope in (5.0, 1.0):
        for x in range(400):
            line.add(x % 10, 2 + slope * (x % 10))
    assert line.fit(min_variance=1.0) == pytest.approx((2, 1), abs=0.01)
