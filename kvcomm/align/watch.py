"""The watch over one bound: a working delta that follows what audits find, and a breaker.

Pairs promise nothing about traffic that has changed since. So every audited outcome moves the delta that rungs are
chosen by: down when the bound was broken, slowly up again while it is kept (adaptive conformal inference, Gibbs and
Candes 2021, arXiv 2106.00170, Eq. 2). Deviation: it never rises above the caller's own delta, so what is promised is
one-sided. Over any T outcomes, whatever the traffic does, violations are at most T delta + (delta + gamma) / gamma:
every step adds at most gamma (delta - violated), and at a delta of 0 or less everything is computed exactly, which
violates nothing. The breaker (see `breaker`) tells apart bad luck from a calibration that does not hold.
"""

from __future__ import annotations

from kvcomm.align.bound import Bound
from kvcomm.align.breaker import Breaker

STEP = 0.5
"""gamma, as a multiple of delta."""


class Watch:
    """What audits say about one bound at one level. Guarded by its owner's lock.

    Attributes:
        working_delta: by which rungs are chosen now; 0 or less: nothing is accepted.
        breaker: the evidence against the bound, of audited requests alone.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.working_delta = bound.delta
        self.breaker = Breaker(bound.delta)

    def audited(self, divergence: float) -> bool:
        """An accepted request was computed exactly and held against it; returns whether the breaker trips with it."""
        violated = self.would_give(divergence)
        return self.breaker.observe(violated)

    def would_give(self, divergence: float) -> bool:
        """What the rung that would have been served gave on a prompt; returns whether that breaks the bound.

        Of exact prompts: so a delta that has fallen too low for anything to be accepted recovers.
        """
        violated = not divergence <= self.bound.max_divergence  # a divergence that is no number breaks it
        moved = self.working_delta + STEP * self.bound.delta * (self.bound.delta - violated)
        self.working_delta = min(moved, self.bound.delta)
        return violated

    def reset(self) -> None:
        """Begin anew, as with other pairs."""
        self.working_delta, self.breaker = self.bound.delta, Breaker(self.bound.delta)
