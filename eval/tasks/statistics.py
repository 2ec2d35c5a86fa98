"""The statistics of reports: shares with intervals, paired flips, passes among drawn answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


def wilson(count: int, total: int) -> Interval:
    """A share with its 95 % interval; of nothing: 0, and anything is possible."""
    from statsmodels.stats.proportion import proportion_confint

    if not total:
        return Interval(0.0, 0.0, 1.0)
    low, high = proportion_confint(count, total, method="wilson")
    return Interval(count / total, float(low), float(high))


def mcnemar(lost: int, won: int) -> float:
    """Exact p of McNemar's test: as lopsided or more, if flips go either way alike."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, lost], [won, 0]], exact=True).pvalue) if lost + won else 1.0


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that of k samples drawn one is right at least: the unbiased estimate (arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: k samples cannot be drawn of these.
    """
    if not 0 < k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_right} right")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def violation_limit(delta: float, count: int) -> float:
    """Share of violations that a bound which just holds exceeds in one of forty samples: delta + 2 standard errors."""
    return delta + 2 * math.sqrt(delta * (1 - delta) / max(1, count))


def median(values: Iterable[float]) -> float:
    """Of nothing: 0."""
    found = list(values)
    return float(np.median(found)) if found else 0.0


def mean(values: Iterable[float]) -> float | None:
    """Of nothing: None."""
    found = list(values)
    return float(np.mean(found)) if found else None
