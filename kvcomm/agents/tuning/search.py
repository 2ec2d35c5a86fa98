"""What to choose among measured ways to reuse: by divergence on the tuning rows, never by errors of KV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvcomm.agents.tuning.replays import MeasuredPrompts, ReplayedPrompt
from kvcomm.align.bound import Bound
from kvcomm.align.ladder import CORRECTED, TURNED, Ladder, Rung, ladders_of
from kvcomm.config import EngineConfig
from kvcomm.reuse.replay import Outcome

TOKEN: Ladder = tuple(Rung(CORRECTED[0].estimator, share) for share in (0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0))
ROTATE: Ladder = tuple(Rung(TURNED[0].estimator, share) for share in (0.7, 0.5, 0.3, 0.15, 0.1, 0.0))
BASE = (*TOKEN, *ROTATE)
"""Wider and finer than what is served by default."""
PROBED = (TOKEN[3], TOKEN[-1])
"""By which settings of the engine are compared."""
MIN_GAIN = 0.02
"""Share of the divergence that another setting has to take away to be chosen."""


class Candidate(NamedTuple):
    """A setting of the engine to try. `needs_banks`: whether anchors have to be learned anew for it."""

    label: str
    config: EngineConfig
    needs_banks: bool = False


class Point(NamedTuple):
    """One way to reuse, over all prompts: share of the moved tokens computed, mean nats, share of tokens alike."""

    setting: str
    computed: float
    divergence: float
    agreement: float
    on_front: bool = False


class EstimatorChoice(NamedTuple):
    """What an estimator can serve.

    Attributes:
        ladder: rungs to calibrate.
        served: agent -> the cheapest share that keeps the bound on the tuning rows; None: none does.
        computed: mean over agents, 1 where none does.
    """

    ladder: Ladder
    served: Mapping[str, float | None]
    computed: float


def candidates(config: EngineConfig, axis: int, num_groups: int) -> list[Candidate]:
    """Other values of one setting; axes in order of what a trial costs."""
    if axis == 0:
        return [Candidate(f"k={k}", replace(config, neighbors=k)) for k in (4, 16) if k != config.neighbors]
    if axis <= num_groups:
        alphas = list(config.alpha if len(config.alpha) == num_groups else config.alpha * num_groups)
        alphas[axis - 1] = 0.8 * alphas[axis - 1]
        return [Candidate(f"alpha={[round(each, 3) for each in alphas]}", replace(config, alpha=tuple(alphas)))]
    if axis == num_groups + 1:
        found = [(f"sketch_layers={count}", replace(config, sketch_layers=count)) for count in (2, 10)]
        return [Candidate(label, each, needs_banks=True) for label, each in found]
    return []


def num_axes(num_groups: int) -> int:
    """Settings that are searched: k, alpha of every group, layers of sketches."""
    return num_groups + 2


def choose_rungs(measured: MeasuredPrompts, rungs: Sequence[Rung], bound: Bound) -> tuple[Rung, ...]:
    """The rungs to calibrate, one ladder for each estimator that could be measured: the one that computes least first.

    With a ladder that needs no anchors text moves as long as there are none, so none is left out for being dearer.
    """
    found = [choose_ladder(measured, ladder, bound) for ladder in ladders_of(rungs)]
    known = sorted((choice for choice in found if choice is not None), key=lambda choice: choice.computed)
    return tuple(rung for choice in known for rung in choice.ladder)


def choose_ladder(measured: MeasuredPrompts, ladder: Ladder, bound: Bound) -> EstimatorChoice | None:
    """The cheapest rung of every agent that keeps the bound with all safer ones, and the next safer one to it.

    A rung keeps it if at most delta of the tuning prompts violate it: whether that is enough evidence is for the
    calibration to say. Where no agent was measured along the ladder, there is nothing to choose: None.
    """
    served: dict[str, float | None] = {}
    wanted: set[int] = set()
    for agent, prompts in measured.items():
        along = [each for prompt in prompts if (each := prompt.along(ladder)) is not None]
        if not along:
            continue
        kept = _boldest([[outcome.divergence for outcome in each.outcomes] for each in along], bound)
        served[agent] = None if kept is None else ladder[kept].share
        last = 1 if kept is None else kept
        wanted |= {max(0, last - 1), last}
    if not served:
        return None
    costs = [1.0 if share is None else share for share in served.values()]
    return EstimatorChoice(tuple(ladder[index] for index in sorted(wanted)), served, sum(costs) / len(costs))


def pareto(measured: MeasuredPrompts, rungs: Sequence[Rung], label: str = "") -> list[Point]:
    """Every rung over the prompts of all agents, with those marked that nothing beats in both."""
    prompts = [prompt for each in measured.values() for prompt in each]
    return mark_front([point for rung in rungs if (point := _point(prompts, rung, label)) is not None])


def mark_front(points: Sequence[Point]) -> list[Point]:
    """In order of what is computed; a point is on the front if no other is at least as good in both."""
    ordered = sorted(points, key=lambda point: (point.computed, point.divergence))
    found, best = [], float("inf")
    for point in ordered:
        found.append(point._replace(on_front=point.divergence < best))
        best = min(best, point.divergence)
    return found


def score(measured: MeasuredPrompts, rungs: Sequence[Rung]) -> float:
    """Mean nats over agents, prompts and these rungs; infinite where none of them could be measured."""
    outcomes = [
        prompt.outcomes[rung]
        for each in measured.values()
        for prompt in each
        for rung in rungs
        if rung in prompt.outcomes
    ]
    return sum(outcome.divergence for outcome in outcomes) / len(outcomes) if outcomes else math.inf


def _boldest(divergences: Sequence[Sequence[float]], bound: Bound) -> int | None:
    """Index of the boldest rung that holds with all safer ones; None: not even the safest does.

    Args:
        divergences: of every prompt, rung by rung, the safest first.
    """
    worst, chosen = [0.0] * len(divergences), None
    for index in range(len(divergences[0])):
        worst = [max(so_far, each[index]) for so_far, each in zip(worst, divergences, strict=True)]
        if sum(value > bound.max_divergence for value in worst) <= bound.delta * len(worst):
            chosen = index
    return chosen


def _point(prompts: Sequence[ReplayedPrompt], rung: Rung, label: str) -> Point | None:
    known: list[tuple[int, Outcome]] = [
        (prompt.num_moved, prompt.outcomes[rung]) for prompt in prompts if rung in prompt.outcomes
    ]
    if not known:
        return None
    return Point(
        f"{rung}, {label}" if label else str(rung),
        sum(outcome.num_recomputed for _, outcome in known) / max(1, sum(num_moved for num_moved, _ in known)),
        sum(outcome.divergence for _, outcome in known) / len(known),
        sum(outcome.agreement for _, outcome in known) / len(known),
    )
