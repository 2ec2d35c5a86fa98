"""The watch over one bound: a working delta that follows what exact computation shows, and a breaker.

Pairs promise nothing about traffic that has changed since. So whoever breaks the bound more often than it allows gets
into debt, and the delta that rungs are chosen by falls with it: a violation adds 1 - delta to the debt, every other
outcome takes delta away, and it is never below 0. At a debt of `MAX_DEBT` nothing is accepted any more. That is
adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170, Eq. 2) with gamma = delta / MAX_DEBT. Deviation:
the working delta never rises above the caller's own, so what is promised is one-sided.

Whatever the traffic does, of any T outcomes in a row at most T delta + MAX_DEBT + 1 are accepted requests that broke
the bound (while each is known before the next one is decided): the last of them found a debt below MAX_DEBT, and up to
there all others of them had added 1 - delta. What exact prompts would have got adds nothing beyond MAX_DEBT + 1, so a
bad time is left behind as quickly however long it was. The breaker (see `breaker`) ends what goes on being too frequent
among accepted requests alone.

Where only a share of accepted requests is audited, drawn evenly, all this holds of the audited ones, and so of all on
average. Why nobody audits more for a while behind a violation: what those audits find to be good would pay for
violations of a time in which one in fifty was seen.
"""

from __future__ import annotations

from copy import deepcopy

from kvcomm.align.bound import Bound
from kvcomm.align.breaker import Breaker

MAX_DEBT = 2.0
"""Violations."""

_ROUNDING = 1e-9


class Watch:
    """What is known of one bound at one level. Guarded by its owner's lock.

    Attributes:
        bound: that is watched over.
        debt: violations beyond the share of delta that is allowed, since there last were none; at least 0.
        breaker: the evidence against the bound, of audited requests alone.
        within: over the same bound for more traffic, of which this one's is a part: it is told whatever this one is,
            and this one is never laxer.
    """

    def __init__(self, bound: Bound, within: Watch | None = None) -> None:
        self.bound = bound
        self.within = within
        self.debt = 0.0
        self.breaker = Breaker(bound.delta)

    def alone(self) -> Watch:
        """A copy that is part of no other one, and follows nothing."""
        made = Watch(self.bound)
        made.debt, made.breaker = self.debt, deepcopy(self.breaker)
        return made

    @property
    def working_delta(self) -> float:
        """By which rungs are chosen now; 0 or less: nothing is accepted."""
        working = self.bound.delta * (1 - self.debt / MAX_DEBT)
        return working if self.within is None else min(working, self.within.working_delta)

    def lets_any(self, num_pairs: int) -> bool:
        """Whether so many pairs, if none of them broke the bound, could keep the working delta."""
        return self.working_delta >= 1 / (num_pairs + 1) - _ROUNDING

    @property
    def is_tripped(self) -> bool:
        """Whether the bound has been found not to hold."""
        return self.breaker.tripped or (self.within is not None and self.within.is_tripped)

    def audited(self, divergence: float) -> bool:
        """An accepted request was computed exactly and held against it; returns whether a breaker trips with it."""
        trips = self.within is not None and self.within.audited(divergence)
        violated = self._is_broken_by(divergence)
        self.debt = self._debt_after(violated)
        return self.breaker.observe(violated) or trips

    def would_give(self, divergence: float) -> bool:
        """What a prompt that was computed exactly would have got; returns whether that breaks the bound.

        Without it, a delta that has fallen too low for anything to be accepted would never rise again.

        Args:
            divergence: at `Grounds.tried`, of a calibration that does not have this prompt's pair yet.
        """
        if self.within is not None:
            self.within.would_give(divergence)
        violated = self._is_broken_by(divergence)
        self.debt = min(self._debt_after(violated), max(self.debt, MAX_DEBT + 1))
        return violated

    def _is_broken_by(self, divergence: float) -> bool:
        return not divergence <= self.bound.max_divergence  # a divergence that is no number breaks it

    def _debt_after(self, violated: bool) -> float:
        debt = self.debt + violated - self.bound.delta
        return debt if debt > _ROUNDING else 0.0
