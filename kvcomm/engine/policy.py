"""How far a caller lets reuse depart from the exact answer.

A policy is a wish with a unit: at most `max_divergence` nats, kept with probability `confidence`. It says
nothing about how that is reached, and it can only ever allow: what is computed exactly satisfies every
policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcomm.errors import InvalidRequest


@dataclass(frozen=True)
class ReusePolicy:
    """The bound a caller accepts on reused KV.

    This version has exact reuse only: under a policy that is not exact everything is still computed exactly,
    because approximation has to be earned by calibration, and no calibration exists yet.

    Attributes:
        max_divergence: epsilon, nats; KL(exact || reused) averaged over the next 32 tokens. 0.0 allows
            nothing.
        confidence: 1 - delta, the probability with which the bound holds among accepted requests; in (0, 1).

    Raises:
        InvalidRequest: max_divergence is negative or not finite, or confidence is outside (0, 1).
    """

    max_divergence: float = 0.0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_divergence) and self.max_divergence >= 0):
            raise InvalidRequest(
                f"max_divergence must be a finite number of nats >= 0, got {self.max_divergence!r}; "
                "0.0 is exact reuse only"
            )
        if not 0 < self.confidence < 1:
            raise InvalidRequest(f"confidence must be between 0 and 1 exclusive, got {self.confidence!r}")

    @classmethod
    def exact(cls) -> ReusePolicy:
        """The policy that never allows approximation."""
        return cls()

    @property
    def is_exact(self) -> bool:
        """Whether only exact reuse satisfies this policy."""
        return self.max_divergence == 0
