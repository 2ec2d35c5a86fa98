"""Whether the bound holds: what would have been accepted of replayed prompts, and how often that was wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval.figures import Figure
from kvcomm.align.calibration import Calibration
from kvcomm.engine.replay import Outcome

BOUNDS = ((0.02, 0.05), (0.05, 0.05))


class Rungs(NamedTuple):
    """One prompt: its moved tokens, and what each rung of the ladder gave."""

    num_moved: int
    outcomes: Sequence[Outcome]


class Served(NamedTuple):
    """What an accepted request would have got."""

    divergence: float
    num_moved: int
    num_aligned: int


def bound_figures(
    tested: Mapping[str, Sequence[Rungs]], calibrations: Mapping[str, Calibration], bound: tuple[float, float]
) -> list[Figure]:
    """Over the prompts of all agents, each judged by its own calibration, for one (epsilon, delta)."""
    epsilon, delta = bound
    answered = [
        serve(calibrations[agent], prompt, epsilon, delta) for agent, prompts in tested.items() for prompt in prompts
    ]
    served = [each for each in answered if each is not None]
    count = len(served)
    violations = sum(each.divergence > epsilon for each in served) / count if count else 0.0
    limit = delta + 2 * math.sqrt(delta * (1 - delta) / max(1, count))
    aligned = sum(each.num_aligned for each in served) / max(1, sum(each.num_moved for each in served))
    name = f"{round(100 * epsilon):03d}"
    return [
        Figure(f"violations_{name}", violations, "share", goal=f"<= {limit:.3g}"),
        Figure(f"aligned_{name}", aligned, "share", goal=">= 0.7"),
        Figure(f"accepted_{name}", count / max(1, len(answered)), "share"),
        Figure(f"accepted_{name}_requests", count, "requests", goal="200"),
    ]


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
