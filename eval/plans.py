"""The best plan: one rung for each reader, so that all together compute no more than a share of what is moved.

A plan is chosen on some prompts and judged on others; chosen and judged on the same ones it would look better than it
is. Nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eval.replayed import ByAgent, Replayed
from kvcomm import Rung

Plan = Mapping[str, Rung]
"""Agent -> the rung for all of its prompts."""


class Cost(NamedTuple):
    """Of some prompts at their rungs: sums over all of them.

    Attributes:
        divergence: nats.
        computed: moved tokens that were computed after all.
    """

    divergence: float
    computed: int


class _Partial(NamedTuple):
    cost: Cost
    plan: dict[str, Rung]


def best_plan(measured: ByAgent, rungs: Sequence[Rung], max_share: float) -> Plan:
    """The plan with the least divergence on these prompts that computes at most a share of their moved tokens.

    Readers are added one by one; of what is planned for those so far, everything is dropped that is beaten in both
    costs, so all plans are compared without being written down.

    Args:
        rungs: to choose from; one of them must compute nothing.
    """
    num_moved = sum(each.num_moved for prompts in measured.values() for each in prompts)
    partial = [_Partial(Cost(0.0, 0), {})]
    for agent, prompts in measured.items():
        costs = {rung: cost_of(prompts, rung) for rung in rungs}
        grown = [
            _Partial(
                Cost(one.cost.divergence + cost.divergence, one.cost.computed + cost.computed), one.plan | {agent: rung}
            )
            for one in partial
            for rung, cost in costs.items()
            if one.cost.computed + cost.computed <= max_share * num_moved
        ]
        partial = _front(grown)
    return min(partial, key=lambda each: each.cost.divergence).plan


def alike(measured: ByAgent, rung: Rung) -> Plan:
    """The plan of one rung for all."""
    return dict.fromkeys(measured, rung)


def cost_of(prompts: Sequence[Replayed], rung: Rung) -> Cost:
    """Of one agent's prompts at a rung."""
    outcomes = [each.outcomes[rung] for each in prompts]
    return Cost(sum(each.divergence for each in outcomes), sum(each.num_recomputed for each in outcomes))


def judge(measured: ByAgent, plan: Plan) -> tuple[float, float]:
    """Mean nats over all prompts under a plan, and the share of their moved tokens that it computes."""
    costs = [cost_of(prompts, plan[agent]) for agent, prompts in measured.items()]
    num_prompts = sum(map(len, measured.values()))
    num_moved = sum(each.num_moved for prompts in measured.values() for each in prompts)
    divergence, computed = np.sum(costs, axis=0)
    return float(divergence) / num_prompts, float(computed) / num_moved


def _front(plans: Sequence[_Partial]) -> list[_Partial]:
    """Those that no other one beats in both costs."""
    kept: list[_Partial] = []
    for each in sorted(plans, key=lambda each: (each.cost.computed, each.cost.divergence)):
        if not kept or each.cost.divergence < kept[-1].cost.divergence:
            kept.append(each)
    return kept
