"""The breaker: watches audits one by one and trips when violations are more frequent than the bound allows.

A test martingale against "the violation rate is at most delta": the likelihood ratio of audits under a mixture of
higher rates, whose expectation under the hypothesis never exceeds 1. By Ville's inequality it ever reaches 1 / alpha
with probability alpha at most, however often one looks. Source: Waudby-Smith and Ramdas, arXiv 2010.09686, Sec. 4; with
a uniform mixture of a few rates instead of a betting strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvcomm.errors import InvalidRequest

ALPHA = 0.01
FACTORS = (1.5, 2.0, 3.0, 5.0, 10.0)
"""The higher rates, as multiples of delta."""


class Breaker:
    """The evidence against one bound at one level. Guarded by its owner's lock."""

    def __init__(self, delta: float, alpha: float = ALPHA) -> None:
        """Make one.

        Args:
            delta: violation rate that is allowed, in (0, 1).
            alpha: probability of ever tripping although it is kept.
        """
        self.delta = delta
        self.alpha = alpha
        self.num_observed = 0
        self.num_violations = 0
        self.tripped = False
        # Rates above 1 make no sense; the highest sensible one lies between delta and 1.
        self._rates = [min(factor * delta, (1 + delta) / 2) for factor in FACTORS]
        self._log_ratios = [0.0] * len(FACTORS)

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """Logarithm of the likelihood ratio of every rate watched for."""
        return tuple(self._log_ratios)

    def resume(self, log_ratios: Sequence[float], num_observed: int, num_violations: int, *, tripped: bool) -> None:
        """Go on where another breaker with the same delta has stopped.

        Raises:
            InvalidRequest: not one ratio per rate, or more violations than observations.
        """
        if len(log_ratios) != len(FACTORS) or num_violations > num_observed:
            raise InvalidRequest(f"a breaker needs {len(FACTORS)} ratios and no more violations than observations")
        self._log_ratios = list(log_ratios)
        self.num_observed, self.num_violations, self.tripped = num_observed, num_violations, tripped

    @property
    def log_evidence(self) -> float:
        """Logarithm of the martingale."""
        largest = max(self._log_ratios)
        return largest + math.log(sum(math.exp(ratio - largest) for ratio in self._log_ratios) / len(FACTORS))

    def observe(self, violated: bool) -> bool:
        """Count an audit; returns whether the breaker trips with it."""
        self.num_observed += 1
        self.num_violations += violated
        for index, rate in enumerate(self._rates):
            ratio = rate / self.delta if violated else (1 - rate) / (1 - self.delta)
            self._log_ratios[index] += math.log(ratio)
        trips = not self.tripped and self.log_evidence >= -math.log(self.alpha)
        self.tripped = self.tripped or trips
        return trips
