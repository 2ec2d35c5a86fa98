"""What reuse does to a team's programs on HumanEval.

    python -m eval.humaneval --data FOLDER [--limit N] [--modes dense,exact,kvcomm,paper] [--agents 2..5]

Programs are run in a sandbox (`eval.sandbox`). Their accuracy is pass@1 of the greedy answer; with --samples N further
programs are drawn, and pass@k is estimated from those.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from eval.figures import Figure
from eval.gsm8k import figures as verdicts
from eval.sandbox import isolation
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.humaneval import HumanEval
from eval.workload import note


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    note(f"programs are kept apart by {isolation()}")
    return command.main(command.Evaluation("humaneval", lambda data: HumanEval(), figures, limit=20), arguments)


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """pass@1, and flips of all modes but dense."""
    found = [Figure(f"pass_at_1_{name}", result.accuracy.value, "share") for name, result in results.items()]
    found += [
        Figure(f"pass_at_{k}_drawn_{name}", value, "share")
        for name, result in results.items()
        for k, value in result.pass_at.items()
    ]
    return [*found, *(each for each in verdicts(results) if each.id.startswith("flips"))]


if __name__ == "__main__":
    sys.exit(main())
