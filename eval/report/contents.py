"""What a report holds, and writing it three ways."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.figures import Figure
from eval.tasks.analysis import Interval, ModeResult, as_values

if TYPE_CHECKING:
    from kvcomm import Engine


@dataclass(frozen=True)
class Contents:
    """Everything of one run.

    Attributes:
        name: of the task.
        memory: bytes of the pool, of anchor banks.
        ttft: mode -> (prompt tokens, seconds to the first token) of every request.
    """

    name: str
    figures: Sequence[Figure]
    results: Sequence[ModeResult]
    settings: Mapping[str, Any]
    memory: Mapping[str, int]
    ttft: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "name": self.name,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "figures": [{**figure.to_json(), "goal": figure.goal} for figure in self.figures],
            "modes": [as_values(result) for result in self.results],
            "settings": dict(self.settings),
            "memory": dict(self.memory),
        }


def memory_of(engine: Engine) -> dict[str, int]:
    """Bytes of the pool, and of what the banks of anchors hold."""
    banks = engine.reuse.anchors.banks(engine.namespace())
    return {
        "pool_bytes": engine.pool.num_pages * engine.pool.page_size * engine.geometry.kv_bytes_per_token,
        "anchor_bytes": sum(bank.snapshot().num_bytes for bank in banks),
    }


def write_report(contents: Contents, folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    from eval.report.page import page

    (folder / "report.json").write_text(json.dumps(contents.to_json(), indent=2, default=_plain) + "\n")
    (folder / "report.md").write_text(markdown(contents))
    (folder / "report.html").write_text(page(contents))


def markdown(contents: Contents) -> str:
    """A summary for pull requests."""
    lines = [f"# {contents.name}", "", "| figure | value | 95 % or quartiles | wanted |", "|---|---:|---|---|"]
    for figure in contents.figures:
        spread = "" if figure.spread is None else f"{figure.spread[0]:.3g} to {figure.spread[1]:.3g}"
        lines.append(f"| {figure.id} | {figure.value:.4g} {figure.unit} | {spread} | {figure.goal} |")
    head, *body = mode_rows(contents.results)
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines) + "\n"


def mode_rows(results: Sequence[ModeResult]) -> list[list[str]]:
    """The table of modes: a head and one row per mode."""
    head = [
        "mode",
        "right",
        "strictly",
        "flips",
        "lost, won",
        "McNemar p",
        "reading changed",
        "divergence",
        "same tokens",
    ]
    head += ["exact", "aligned", "computed", "approximated", "above the bound", "TTFT of the team", "pool of reasons"]
    rows = [head]
    for each in results:
        total = max(1, sum(each.tokens.values()))
        rows.append(
            [
                each.mode,
                share(each.accuracy),
                share(each.strict),
                share(each.flips),
                f"{each.lost}, {each.won}",
                f"{each.mcnemar_p:.3f}",
                share(each.changed),
                "" if each.mean_divergence is None else f"{each.mean_divergence:.4f} nats",
                f"{each.same:.0%}",
                *(f"{each.tokens[kind] / total:.0%}" for kind in ("exact", "aligned", "computed")),
                share(each.approximated),
                "" if each.violations is None else share(each.violations),
                f"{each.team_ttft_s:.2f} s",
                ", ".join(f"{name} {count / total:.0%}" for name, count in list(each.reasons.items())[:4]),
            ]
        )
    rows[0][-1] = "computed because"
    return rows


def share(interval: Interval) -> str:
    """A share with its interval, for people."""
    return f"{interval.value:.1%} ({interval.low:.0%} to {interval.high:.0%})"


def _plain(value: object) -> object:
    sys.stderr.write(f"report: {type(value).__name__} is written as text\n")
    return str(value)
