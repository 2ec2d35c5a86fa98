"""What reuse does to a team's answers on GSM8K.

    python -m eval.gsm8k --data FOLDER [--limit N] [--modes dense,kvcomm,paper] [--agents 2..5] [--topology full]

A flip is a question whose verdict, right or wrong, is not that of the dense run, either way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from eval.figures import Figure
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.modes import DENSE


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    return command.main(command.Evaluation("gsm8k", lambda data: Gsm8k(), figures, limit=100), arguments)


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """Accuracies, and flips of all modes but dense."""
    found = [Figure(f"accuracy_{name}", result.accuracy.value, "share") for name, result in results.items()]
    for name, result in results.items():
        if name != DENSE:
            goal = "<= half of flips_paper" if name == "kvcomm" else ""
            found.append(
                Figure(f"flips_{name}", result.flips.value, "share", (result.flips.low, result.flips.high), goal)
            )
            found.append(Figure(f"changed_{name}", result.changed.value, "share"))
    return found


if __name__ == "__main__":
    sys.exit(main())
