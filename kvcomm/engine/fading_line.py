"""A straight line through measurements, of which older ones count less."""

from __future__ import annotations

from typing import NamedTuple

FADING = 0.98
"""Weight that a measurement keeps with each later one."""

MIN_WEIGHT = 4.0
"""Of all measurements, from which on there is a line."""


class StraightLine(NamedTuple):
    """y = offset + slope x."""

    offset: float
    slope: float


class FadingLine:
    """Least squares. Used by one thread."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # weights, x, y, x squared, x times y

    def add(self, x: float, y: float) -> None:
        """One more measurement."""
        found = (1.0, x, y, x * x, x * y)
        self._sums = [FADING * known + new for known, new in zip(self._sums, found, strict=True)]

    def fit(self, min_variance: float) -> StraightLine | None:
        """The line; None where there are too few measurements, or all at nearly the same x.

        Args:
            min_variance: of x.
        """
        weight, x, y, squares, products = self._sums
        spread = weight * squares - x * x
        if weight < MIN_WEIGHT or spread < min_variance * weight * weight:
            return None
        slope = (weight * products - x * y) / spread
        return StraightLine((y - slope * x) / weight, slope)
