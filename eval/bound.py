"""Whether the bound holds: what would have been accepted of replayed prompts, and how often that was wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.figures import Figure
from kvcomm.align.calibration import Calibration
from kvcomm.align.intervals import violation_limit
from kvcomm.reuse.decision import Rungs, serve

BOUNDS = ((0.02, 0.05), (0.05, 0.05))


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
    limit = violation_limit(delta, count)
    aligned = sum(each.num_aligned for each in served) / max(1, sum(each.num_moved for each in served))
    name = f"{round(100 * epsilon):03d}"
    return [
        Figure(f"violations_{name}", violations, "share", goal=f"<= {limit:.3g}"),
        Figure(f"aligned_{name}", aligned, "share", goal=">= 0.7"),
        Figure(f"accepted_{name}", count / max(1, len(answered)), "share"),
        Figure(f"accepted_{name}_requests", count, "requests", goal="200"),
    ]
