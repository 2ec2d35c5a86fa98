"""Compare two reports of the same task.

    python -m eval.report A B

A and B are folders of task evaluations, or their report.json. Prints every figure of both and which settings differ;
where both were asked the same questions and their answers are at hand, also how each mode's answers differ, paired.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from eval.figures import PIPE_WIDTH
from eval.tasks.analysis import analyse
from eval.tasks.samples import SampleFile
from kvcomm.errors import InvalidRequest
from kvcomm.lab.files import BadContent, parse_json, read_bytes

Values = Mapping[str, Any]


class Run(NamedTuple):
    """A report, and the folder it lies in."""

    values: Values
    folder: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = ArgumentParser(prog="python -m eval.report", description="Compare two reports of the same task.")
    parser.add_argument("reports", nargs=2, type=Path, metavar="REPORT", help="folder of a run, or its report.json")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    try:
        one, other = (read(file) for file in options.reports)
        if one.values["name"] != other.values["name"]:
            raise InvalidRequest(
                f"a report on {one.values['name']} cannot be compared with one on {other.values['name']}"
            )
        paired = pair(one, other)
    except InvalidRequest as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    console.print(table(one.values, other.values))
    if paired is not None:
        console.print(paired)
    for line in differences(one.values["settings"], other.values["settings"]):
        console.print(line, markup=False)
    return 0


def read(file: Path) -> Run:
    """A report.

    Raises:
        InvalidRequest: not one; names the file.
    """
    path = file / "report.json" if file.is_dir() else file
    try:
        found = parse_json(read_bytes(path))
    except (OSError, BadContent) as error:
        raise InvalidRequest(f"{path} is no report of a task evaluation: {error}") from error
    if not isinstance(found, dict) or not {"name", "figures", "settings"} <= found.keys():
        raise InvalidRequest(f"{path} is no report of a task evaluation: it lacks name, figures or settings")
    return Run(found, path.parent)


def table(one: Values, other: Values) -> Table:
    """Every figure of both, and the difference; intervals that do not overlap are marked."""
    view = _view(one["name"], "figure", "A", "B", "B - A")
    view.add_column("", header_style="dim")
    figures = [{figure["id"]: figure for figure in report["figures"]} for report in (one, other)]
    for name in dict.fromkeys([*figures[0], *figures[1]]):
        found = [each.get(name) for each in figures]
        cells = ["" if each is None else f"{each['value']:.4g} {each['unit']}" for each in found]
        difference, remark = "", ""
        if found[0] and found[1]:
            difference = f"{found[1]['value'] - found[0]['value']:+.4g}"
            spreads = [each["spread"] for each in found if each is not None and each["spread"]]
            is_apart = len(spreads) == 2 and (spreads[0][1] < spreads[1][0] or spreads[1][1] < spreads[0][0])
            remark = "intervals do not overlap" if is_apart else ""
        view.add_row(name, *cells, difference, remark)
    return view


def pair(one: Run, other: Run) -> Table | None:
    """How the answers of each mode differ from A to B, question by question; None: not the same questions, or no files.

    Raises:
        InvalidRequest: a file of answers is damaged.
    """
    if one.values["settings"].get("rows") != other.values["settings"].get("rows"):
        return None
    view = _view("answers, paired", "mode", "questions", "lost", "won", "McNemar p", "read differently")
    for mode in [each["mode"] for each in one.values.get("modes", [])]:
        files = [SampleFile(run.folder / "samples" / f"{mode}.jsonl") for run in (one, other)]
        before, now = (file.by_index() for file in files)
        if before and now:
            result = analyse(mode, now, before)
            outcome = result.outcome
            changed = f"{outcome.changed.value:.1%}"
            counts = (str(result.num_questions), str(outcome.lost), str(outcome.won))
            view.add_row(mode, *counts, f"{outcome.mcnemar_p:.3f}", changed)
    return view if view.row_count else None


def differences(one: Values, other: Values) -> list[str]:
    """Settings that are not the same; other questions make figures hard to compare, and that is said first."""
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    lines = ["not the same questions: differences are of the questions, too"] if "rows" in names else []
    return lines + [f"{name}: {one.get(name)} in A, {other.get(name)} in B" for name in names]


def _view(title: str, first: str, *others: str) -> Table:
    view = Table(title=title, title_justify="left", box=None, pad_edge=False)
    view.add_column(first, header_style="dim")
    for head in others:
        view.add_column(head, justify="right", header_style="dim")
    return view


if __name__ == "__main__":
    sys.exit(main())
