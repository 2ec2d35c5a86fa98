"""What a report holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.figures import Figure
from eval.report.tables import Table, all_tables
from eval.report.verdict import verdict
from eval.tasks.analysis import ModeResult, as_values
from eval.tasks.modes import KVCOMM
from eval.tasks.task import Task
from eval.tasks.timing import Timed


@dataclass(frozen=True)
class Contents:
    """Everything of one run.

    Attributes:
        figures: what the run is held against.
        settings: what decides what is computed.
        facts: what it was computed with.
        times: every timed request.
    """

    task: Task
    figures: Sequence[Figure]
    results: Sequence[ModeResult]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    times: Sequence[Timed]

    @property
    def verdict(self) -> str:
        """What it comes to, in one sentence."""
        return verdict(self.results)

    @property
    def tables(self) -> list[Table]:
        """For people."""
        return all_tables(self.results, self.task, self.facts)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "name": self.task.name,
            "verdict": self.verdict,
            "figures": [{**figure.to_json(), "goal": figure.goal} for figure in self.figures],
            "modes": [as_values(result) for result in self.results],
            "settings": dict(self.settings),
            "facts": dict(self.facts),
        }


def bound_figures(results: Mapping[str, ModeResult], max_computed: float | None = None) -> list[Figure]:
    """What all tasks are held against: divergences, what is computed, and the bound where one was in force.

    Args:
        max_computed: share of the prompt tokens that kvcomm is to compute at most; None: there is no such goal.
    """
    found = []
    for name, result in results.items():
        if (divergence := result.damage.mean_divergence) is not None:
            found.append(Figure(f"divergence_{name}", divergence, "nats"))
        goal = f"<= {max_computed:g}" if name == KVCOMM and max_computed is not None else ""
        found.append(Figure(f"computed_{name}", result.reuse.computed_share, "share", goal=goal))
    own = results.get(KVCOMM)
    if own is not None and own.damage.violations is not None:
        share, limit = own.damage.violations, own.damage.violation_limit
        found.append(Figure("violations", share.value, "share", (share.low, share.high), f"<= {limit:.3g}"))
        found.append(Figure("audited", own.damage.num_audited, "requests"))
    return found


def figure_cells(figure: Figure) -> list[str]:
    """A figure as cells of a table."""
    spread = "" if figure.spread is None else f"{figure.spread[0]:.3g} to {figure.spread[1]:.3g}"
    return [figure.id, f"{figure.value:.4g} {figure.unit}", spread, figure.goal]
