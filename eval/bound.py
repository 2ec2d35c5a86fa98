"""Whether the bound holds: what would have been accepted of replayed prompts, and how often that was wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.figures import Figure
from kvcomm.lab.bounds import Bound, Calibration, Rungs, serve, violation_limit

BOUNDS = (Bound(0.02, 0.05), Bound(0.05, 0.05))
GOALS = {"aligned_002": ">= 0.85", "aligned_005": ">= 0.93"}


def bound_figures(
    tested: Mapping[str, Sequence[Rungs]], calibrations: Mapping[str, Calibration], bound: Bound, prefix: str = ""
) -> list[Figure]:
    """Over the prompts of all agents, each judged by its own calibration.

    Args:
        tested: by agent, every prompt with outcomes in the order of its calibration's ladder.
        prefix: of the figures' names; those without one are held against goals.
    """
    prompts = [(agent, prompt) for agent, found in tested.items() for prompt in found]
    answered = [serve(calibrations[agent], prompt, bound) for agent, prompt in prompts]
    served = [each for each in answered if each is not None]
    count = len(served)
    violations = sum(each.divergence > bound.max_divergence for each in served) / count if count else 0.0
    limit = violation_limit(bound.delta, count)
    num_aligned = sum(each.num_aligned for each in served)
    aligned = num_aligned / max(1, sum(each.num_moved for each in served))
    of_all = num_aligned / max(1, sum(prompt.num_moved for _, prompt in prompts))
    name = f"{round(100 * bound.max_divergence):03d}"
    return [
        Figure(f"{prefix}violations_{name}", violations, "share", goal=f"<= {limit:.3g}"),
        Figure(f"{prefix}aligned_{name}", aligned, "share", goal="" if prefix else GOALS.get(f"aligned_{name}", "")),
        Figure(f"{prefix}aligned_of_all_{name}", of_all, "share"),
        Figure(f"{prefix}accepted_{name}", count / max(1, len(answered)), "share"),
        Figure(f"{prefix}accepted_{name}_requests", count, "requests", goal="" if prefix else "200"),
    ]
