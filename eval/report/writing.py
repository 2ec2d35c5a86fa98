"""A report written three ways: as values, as a summary and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.contents import Contents, figure_cells


def write_report(contents: Contents, folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    from eval.report.page import page  # and what draws plots

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
        contents.verdict,
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
