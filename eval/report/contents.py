"""What a report holds, and writing it three ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.figures import Figure
from eval.report.tables import Table, all_tables
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
    def tables(self) -> list[Table]:
        """For people."""
        return all_tables(self.results, self.task, self.facts)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "name": self.task.name,
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


def write_report(contents: Contents, folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    from eval.report.page import page

    text = json.dumps(_finite(contents.to_json()), indent=2, allow_nan=False)
    (folder / "report.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(contents), encoding="utf-8")
    (folder / "report.html").write_text(page(contents), encoding="utf-8")


def markdown(contents: Contents) -> str:
    """A summary for pull requests."""
    settings = contents.settings
    lines = [
        f"# {contents.task.name}: what reuse does to a team's answers",
        "",
        f"{contents.results[0].num_questions} questions, {settings['agents']} agents, topology {settings['topology']}, "
        f"model {settings['model']}, bound ({settings['max_divergence']}, {1 - settings['confidence']:.3g}).",
        "",
        *_rows(["figure", "value", "95 %", "wanted"], [figure_cells(figure) for figure in contents.figures]),
    ]
    for table in contents.tables:
        lines += ["", f"## {table.title}", "", *_rows(table.head, table.rows)]
        lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def figure_cells(figure: Figure) -> list[str]:
    """A figure as cells of a table."""
    spread = "" if figure.spread is None else f"{figure.spread[0]:.3g} to {figure.spread[1]:.3g}"
    return [figure.id, f"{figure.value:.4g} {figure.unit}", spread, figure.goal]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _finite(value: Any) -> Any:
    """JSON has no infinities: null."""
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
