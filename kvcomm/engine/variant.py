"""One given way to reuse a prompt, as opposed to a policy, which leaves the way to the engine."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """One way to reuse a prompt, whatever it costs in divergence: for `Engine.measure` and for comparisons.

    Attributes:
        estimator: "token", "paper" or "rotate".
        share: of the moved tokens that may be recomputed.
        selector: which ones: "attention", "influence", "head" or "deviation".
        strength: factor on the estimator's correction.
    """

    estimator: str
    share: float = 0.0
    selector: str = "attention"
    strength: float = 1.0
