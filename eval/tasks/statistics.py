"""The statistics of reports: paired flips, passes among drawn answers; intervals are in `kvcomm.align.intervals`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


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


def median(values: Iterable[float]) -> float:
    """Of nothing: 0."""
    found = list(values)
    return float(np.median(found)) if found else 0.0


def mean(values: Iterable[float]) -> float | None:
    """Of nothing: None."""
    found = list(values)
    return float(np.mean(found)) if found else None
