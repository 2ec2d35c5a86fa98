"""How far a caller lets reuse depart from the exact answer.

A policy is a wish with a unit: at most `max_divergence` nats, kept with probability `confidence`. It can only ever
allow: what is computed exactly satisfies every policy, and nothing is approximated without pairs that speak for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from kvcomm.align.bound import Bound
from kvcomm.align.ladder import DEFAULT_RUNGS, Ladder, Rung, ladders_of
from kvcomm.align.standings import LEVELS, Level
from kvcomm.errors import InvalidRequest
from kvcomm.values import items, real_number, text, told, truth_value, whole_number

DEFAULT_AUDIT = 0.02
DEFAULT_HEAL_WITHIN = 8


@dataclass(frozen=True)
class ReusePolicy:
    """The bound a caller accepts on reused KV, and what may be done to earn it.

    Attributes:
        max_divergence: epsilon, nats; KL(exact || reused) averaged over the next 32 tokens. 0.0 allows nothing.
        confidence: 1 - delta, the probability with which the bound holds among accepted requests; in (0, 1).
        basis: the least that the caller accepts as grounds: "prior" (pairs that ship with the model), "pool" (pairs of
            the tenant's own traffic) or "own" (pairs of the same reader). What each promises: `kvcomm.align.levels`.
        rungs: ways to reuse moved text; those of one estimator form a ladder, the safest first.
        learn: whether exact requests teach anchors and pairs.
        audit: share of approximate requests that are computed exactly afterwards to watch over the bound; the first
            ones of a new reader all are, unless it is 0.
        heal: whether moved KV is replaced by exact KV while the answer is decoded, so that its context ends up exact
            and serves later readers as an exact source. Costs what a dense prefill costs, behind the first token.
        heal_within: tokens of the answer, at least 1, that are drawn on moved KV; behind them all of it is exact. A
            shorter answer's text is out as soon as ever, and its request ends when its context is exact.

    Raises:
        InvalidRequest: a value outside its range; the message names it.
    """

    max_divergence: float = 0.0
    confidence: float = 0.95
    basis: str = Level.PRIOR.value
    rungs: tuple[Rung, ...] = DEFAULT_RUNGS
    learn: bool = True
    audit: float = DEFAULT_AUDIT
    heal: bool = False
    heal_within: int = DEFAULT_HEAL_WITHIN

    def __post_init__(self) -> None:
        for name in ("max_divergence", "confidence", "audit"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        object.__setattr__(self, "rungs", items("rungs", self.rungs, "a tuple of Rung"))
        for name in ("learn", "heal"):
            object.__setattr__(self, name, truth_value(name, getattr(self, name)))
        object.__setattr__(self, "heal_within", whole_number("heal_within", self.heal_within))
        object.__setattr__(self, "basis", str(text("basis", self.basis)))
        if not (math.isfinite(self.max_divergence) and self.max_divergence >= 0):
            raise InvalidRequest(
                f"max_divergence must be a finite number of nats >= 0, got {self.max_divergence!r}; "
                "0.0 is exact reuse only"
            )
        if not 0 < self.confidence < 1:
            raise InvalidRequest(f"confidence must be between 0 and 1 exclusive, got {self.confidence!r}")
        if not 0 <= self.audit <= 1:
            raise InvalidRequest(f"audit must be a share between 0 and 1, got {self.audit!r}")
        if self.heal_within < 1:
            raise InvalidRequest(
                f"heal_within must be at least 1 token of the answer, got {self.heal_within!r}; "
                "ReusePolicy.exact() moves nothing"
            )
        if self.basis not in LEVELS:
            raise InvalidRequest(f"basis must be one of {', '.join(reversed(LEVELS))}, got {self.basis!r}")
        self._require_ladders()

    def _require_ladders(self) -> None:
        if not self.rungs or not all(isinstance(rung, Rung) for rung in self.rungs):
            raise InvalidRequest(f'rungs must be some of Rung, such as Rung("token", 0.3), got {self.rungs!r}')
        for ladder in self.ladders:
            if not all(safer.share >= bolder.share for safer, bolder in pairwise(ladder)):
                raise InvalidRequest(
                    f"rungs of one estimator go from the safest to the boldest, got {', '.join(map(str, ladder))}"
                )
            if len({rung.chooser for rung in ladder if rung.share}) > 1:
                raise InvalidRequest(
                    f"rungs of one estimator have one chooser, got {', '.join(map(str, ladder))}: only then each holds "
                    "what bolder ones compute"
                )
            if ladder[0].share >= 1:
                raise InvalidRequest(f"rungs have a share below 1 (all is exact), got {', '.join(map(str, ladder))}")

    @classmethod
    def exact(cls) -> ReusePolicy:
        """The policy that never allows approximation."""
        return cls()

    @cached_property
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

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        """The rungs by estimator, as they are given."""
        return ladders_of(self.rungs)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that may decide, the most specific first."""
        return LEVELS[: LEVELS.index(Level(self.basis)) + 1]


AnyPolicy = TypeVar("AnyPolicy", bound=ReusePolicy | None)


def checked_policy(policy: AnyPolicy) -> AnyPolicy:
    """The same policy; raises InvalidRequest where it is none."""
    if not isinstance(policy, ReusePolicy | None):
        raise InvalidRequest(f"policy must be a ReusePolicy, not {told(policy)}; exact reuse is ReusePolicy.exact()")
    return policy
