"""Shares of violations: with their intervals, and how large they may be by chance where a bound just holds."""

from __future__ import annotations

import math
from typing import NamedTuple

Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """A share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


def wilson(count: int, total: int) -> Interval:
    """The interval of `count` in `total`; of nothing: 0, and anything is possible.

    Source: Wilson, JASA 22 (1927), p. 209.
    """
    if not total:
        return Interval(0.0, 0.0, 1.0)
    share, square = count / total, Z_95**2
    center = (share + square / (2 * total)) / (1 + square / total)
    half = Z_95 / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    low = 0.0 if count == 0 else center - half
    return Interval(share, low, 1.0 if count == total else center + half)


def violation_limit(delta: float, count: int) -> float:
    """Share of violations that a bound which just holds exceeds in one of forty samples: delta + 2 standard errors."""
    return delta + 2 * math.sqrt(delta * (1 - delta) / max(1, count))
