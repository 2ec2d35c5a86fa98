"""How far a caller lets reuse depart from the exact answer.

A policy is a wish with a unit: at most `max_divergence` nats, kept with probability `confidence`. It can only ever
allow: what is computed exactly satisfies every policy, and nothing is approximated before it has been earned by
calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcomm.align.bound import Bound
from kvcomm.errors import InvalidRequest
from kvcomm.values import items, real_number, truth_value

ESTIMATORS = ("token", "paper", "rotate")
DEFAULT_RUNGS = (0.0, 0.15, 0.3, 0.5)
DEFAULT_AUDIT = 0.02


@dataclass(frozen=True)
class ReusePolicy:
    """The bound a caller accepts on reused KV, and what may be done to earn it.

    Attributes:
        max_divergence: epsilon, nats; KL(exact || reused) averaged over the next 32 tokens. 0.0 allows nothing.
        confidence: 1 - delta, the probability with which the bound holds among accepted requests; in (0, 1).
        rungs: the ladder: shares of the moved tokens that may be recomputed, ascending, each in [0, 1).
        estimator: how moved KV is corrected: "token", "paper" or "rotate".
        learn: whether idle time is spent on anchors and calibration after exact requests.
        audit: share of approximate requests that are recomputed exactly in idle time to watch over the bound.

    Raises:
        InvalidRequest: a value outside its range; the message names it.
    """

    max_divergence: float = 0.0
    confidence: float = 0.95
    rungs: tuple[float, ...] = DEFAULT_RUNGS
    estimator: str = "token"
    learn: bool = True
    audit: float = DEFAULT_AUDIT

    def __post_init__(self) -> None:
        for name in ("max_divergence", "confidence", "audit"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        rungs = items("rungs", self.rungs, "ascending shares in [0, 1)")
        object.__setattr__(self, "rungs", tuple(real_number("each of rungs", share) for share in rungs))
        object.__setattr__(self, "learn", truth_value("learn", self.learn))
        if not (math.isfinite(self.max_divergence) and self.max_divergence >= 0):
            raise InvalidRequest(
                f"max_divergence must be a finite number of nats >= 0, got {self.max_divergence!r}; "
                "0.0 is exact reuse only"
            )
        if not 0 < self.confidence < 1:
            raise InvalidRequest(f"confidence must be between 0 and 1 exclusive, got {self.confidence!r}")
        is_ladder = self.rungs and all(low < high for low, high in zip(self.rungs, self.rungs[1:], strict=False))
        if not is_ladder or self.rungs[0] < 0 or self.rungs[-1] >= 1:
            raise InvalidRequest(f"rungs must be ascending shares in [0, 1), got {self.rungs!r}; all tokens is exact")
        if self.estimator not in ESTIMATORS:
            raise InvalidRequest(f"unknown estimator {self.estimator!r}; there are {', '.join(ESTIMATORS)}")
        if not 0 <= self.audit <= 1:
            raise InvalidRequest(f"audit must be a share between 0 and 1, got {self.audit!r}")

    @classmethod
    def exact(cls) -> ReusePolicy:
        """The policy that never allows approximation."""
        return cls()

    @property
    def is_exact(self) -> bool:
        """Whether only exact reuse satisfies this policy."""
        return self.max_divergence == 0

    @property
    def bound(self) -> Bound | None:
        """The bound in force; None where only exact reuse is allowed."""
        return None if self.is_exact else Bound(self.max_divergence, self.delta)

    @property
    def delta(self) -> float:
        """Probability with which the bound may be broken among accepted requests."""
        return 1 - self.confidence
