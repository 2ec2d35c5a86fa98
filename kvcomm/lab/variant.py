"""One given way to reuse a prompt, as opposed to a policy, which leaves the way to the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ESTIMATORS

SELECTOR_NAMES = ("attention", "influence", "head", "deviation")


@dataclass(frozen=True)
class Variant:
    """One way to reuse a prompt, whatever it costs in divergence: for `Engine.measure` and for comparisons.

    Attributes:
        estimator: "token", "paper" or "rotate".
        share: of the moved tokens that may be recomputed, in [0, 1].
        selector: which ones: "attention", "influence", "head" or "deviation".
        strength: factor on the estimator's correction.

    Raises:
        InvalidRequest: a value outside its range; the message names it.
    """

    estimator: str
    share: float = 0.0
    selector: str = "attention"
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, ESTIMATORS),
            ("selector", self.selector, SELECTOR_NAMES),
        ):
            if value not in known:
                raise InvalidRequest(f"unknown {name} {value!r}; there are {', '.join(known)}")
        if not 0 <= self.share <= 1:
            raise InvalidRequest(f"share must be between 0 and 1, got {self.share!r}")
        if not math.isfinite(self.strength):
            raise InvalidRequest(f"strength must be a finite number, got {self.strength!r}")
