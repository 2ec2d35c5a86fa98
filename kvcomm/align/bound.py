"""The bound that a caller accepts: two numbers with names."""

from __future__ import annotations

from typing import NamedTuple


class Bound(NamedTuple):
    """P(divergence > max_divergence) <= delta among accepted requests.

    Attributes:
        max_divergence: epsilon, nats; KL(exact || reused) averaged over the next 32 tokens.
        delta: the probability with which it may be broken.
    """

    max_divergence: float
    delta: float

    @property
    def confidence(self) -> float:
        """1 - delta."""
        return 1 - self.delta
