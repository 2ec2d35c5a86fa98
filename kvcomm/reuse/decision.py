"""What would be accepted of replayed prompts: the rule by which requests are served, applied to known outcomes.

Verification of a profile and the evaluation of the bound both ask it, so they judge what a planner would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvcomm.align.calibration import Calibration


class Replayed(Protocol):
    """What is known of one replay; see `engine.replay.Outcome`."""

    @property
    def divergence(self) -> float:
        """Mean nats over the continuation."""
        ...

    @property
    def agreement(self) -> float:
        """Share of the continuation's tokens at which both put the same token first."""
        ...

    @property
    def distance(self) -> float:
        """Of the text from what the estimator knows."""
        ...

    @property
    def residual(self) -> float | None:
        """Of the recomputed tokens; None where none were."""
        ...

    @property
    def num_recomputed(self) -> int:
        """Moved tokens that were computed after all."""
        ...


class Rungs(NamedTuple):
    """One prompt: its moved tokens, and what each rung of the ladder gave."""

    num_moved: int
    outcomes: Sequence[Replayed]


class Served(NamedTuple):
    """What an accepted request would have got."""

    divergence: float
    num_moved: int
    num_aligned: int


def serve(calibration: Calibration, prompt: Rungs, epsilon: float, delta: float) -> Served | None:
    """What the planner does: the chosen rung, unless the text is too far off; the next one while probes are.

    None: computed exactly.
    """
    rung = calibration.choose(epsilon, delta)
    limit = calibration.distance_limit
    if rung is None or limit is None or prompt.outcomes[0].distance > limit:
        return None
    for index in range(rung, len(prompt.outcomes)):
        outcome, residual_limit = prompt.outcomes[index], calibration.residual_limit(index)
        if outcome.residual is None or (residual_limit is not None and outcome.residual <= residual_limit):
            return Served(outcome.divergence, prompt.num_moved, prompt.num_moved - outcome.num_recomputed)
    return None
