"""What to choose among measured ways to reuse: by divergence on the tuning rows, never by errors of KV.

Rungs choose tokens by `attention` and anchors are kept for `token`; what other selectors give is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvcomm.agents.tuning.replays import Measured
from kvcomm.config import EngineConfig
from kvcomm.lab.variant import Variant
from kvcomm.reuse.decision import Rungs

SHARES = (0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
TOKEN = tuple(Variant("token", share) for share in SHARES)
ROTATE_SHARES = (0.0, 0.15, 0.3, 0.5)
"""Fewer: rotation is an alternative where corrections do not help, and every share costs replays of all tuning rows."""
ROTATE = tuple(Variant("rotate", share) for share in ROTATE_SHARES)
SELECTORS = tuple(Variant("token", 0.3, selector) for selector in ("influence", "head", "deviation"))
BASE = (*TOKEN, *ROTATE, *SELECTORS)
PROBED = (TOKEN[0], TOKEN[3])
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


class Ladder(NamedTuple):
    """What an estimator can serve.

    Attributes:
        rungs: shares to calibrate.
        served: agent -> the cheapest share that keeps the bound on the tuning rows; None: none does.
        computed: mean over agents, 1 where none does.
    """

    estimator: str
    rungs: tuple[float, ...]
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


def choose_ladder(
    measured: Measured, variants: Sequence[Variant], estimator: str, bound: tuple[float, float]
) -> Ladder:
    """The cheapest share of every agent that keeps (epsilon, delta) with all costlier ones, and the next one above it.

    A share keeps it if at most delta of the tuning prompts violate it: whether that is enough evidence is for the
    calibration to say.
    """
    places = [
        index for index, each in enumerate(variants) if (each.estimator, each.selector) == (estimator, "attention")
    ]
    shares = [variants[index].share for index in places]
    served: dict[str, float | None] = {}
    rungs: set[float] = set()
    for agent, prompts in measured.items():
        kept = _cheapest(prompts, places, bound)
        served[agent] = None if kept is None else shares[kept]
        first = len(shares) - 2 if kept is None else kept
        rungs.update(shares[first : first + 2])
    costs = [1.0 if share is None else share for share in served.values()]
    return Ladder(estimator, tuple(sorted(rungs)), served, sum(costs) / max(1, len(costs)))


def best_ladder(measured: Measured, variants: Sequence[Variant], bound: tuple[float, float]) -> Ladder:
    """That of the estimator which computes least; of two alike, the one with the smaller divergence."""
    found = [choose_ladder(measured, variants, name, bound) for name in ("token", "rotate")]
    return min(found, key=lambda ladder: (ladder.computed, _mean_of(measured, variants, ladder.estimator)))


def pareto(measured: Measured, variants: Sequence[Variant], label: str = "") -> list[Point]:
    """Every variant over the prompts of all agents, with those marked that nothing beats in both."""
    prompts = [prompt for each in measured.values() for prompt in each]
    points = [_point(prompts, index, _label(variant, label)) for index, variant in enumerate(variants)]
    return mark_front(points)


def mark_front(points: Sequence[Point]) -> list[Point]:
    """In order of what is computed; a point is on the front if no other is at least as good in both."""
    ordered = sorted(points, key=lambda point: (point.computed, point.divergence))
    found, best = [], float("inf")
    for point in ordered:
        found.append(point._replace(on_front=point.divergence < best))
        best = min(best, point.divergence)
    return found


def score(measured: Measured, places: Sequence[int]) -> float:
    """Mean nats over agents, prompts and the variants at these places."""
    values = [prompt.outcomes[place].divergence for each in measured.values() for prompt in each for place in places]
    return sum(values) / max(1, len(values))


def _cheapest(prompts: Sequence[Rungs], places: Sequence[int], bound: tuple[float, float]) -> int | None:
    epsilon, delta = bound
    worst, chosen = [0.0] * len(prompts), None
    for step in reversed(range(len(places))):
        worst = [
            max(so_far, prompt.outcomes[places[step]].divergence) for so_far, prompt in zip(worst, prompts, strict=True)
        ]
        if sum(value > epsilon for value in worst) <= delta * len(prompts):
            chosen = step
    return chosen


def _mean_of(measured: Measured, variants: Sequence[Variant], estimator: str) -> float:
    """Over the shares at which both estimators are measured."""
    wanted = [Variant(estimator, share) for share in ROTATE_SHARES]
    return score(measured, [index for index, each in enumerate(variants) if each in wanted])


def _point(prompts: Sequence[Rungs], index: int, label: str) -> Point:
    outcomes = [(prompt.num_moved, prompt.outcomes[index]) for prompt in prompts]
    count = max(1, len(outcomes))
    return Point(
        label,
        sum(outcome.num_recomputed for _, outcome in outcomes) / max(1, sum(moved for moved, _ in outcomes)),
        sum(outcome.divergence for _, outcome in outcomes) / count,
        sum(outcome.agreement for _, outcome in outcomes) / count,
    )


def _label(variant: Variant, label: str) -> str:
    chosen = variant.estimator if not variant.share else f"{variant.estimator} {variant.share:.0%} {variant.selector}"
    return f"{chosen}, {label}" if label else chosen
