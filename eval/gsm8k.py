"""What reuse does to a team's answers on GSM8K.

    python -m eval.gsm8k --data FOLDER [--limit N] [--modes dense,kvcomm,paper] [--agents 2..5] [--topology full]

A flip is a question whose verdict, right or wrong, is not that of the dense run, either way.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from eval.figures import Figure
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.modes import DENSE, KVCOMM
from eval.tasks.program import add_isolation_option

MAX_COMPUTED = 0.14


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    evaluation = command.Evaluation(
        "gsm8k", make_task, figures, 100, add_options=add_isolation_option, max_computed=MAX_COMPUTED
    )
    return command.main(evaluation, arguments)


def make_task(options: Namespace) -> Gsm8k:
    """With what the options say of programs."""
    return Gsm8k(unsafe=options.unsafe)


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """Accuracies, and flips of all modes but dense."""
    found = []
    for name, result in results.items():
        accuracy, strict = result.outcome.accuracy, result.outcome.otherwise
        found.append(Figure(f"accuracy_{name}", accuracy.value, "share", (accuracy.low, accuracy.high)))
        found.append(Figure(f"strict_{name}", strict.value, "share", (strict.low, strict.high)))
    return [*found, *flips(results)]


def flips(results: Mapping[str, ModeResult]) -> list[Figure]:
    """Of all modes but dense."""
    found = []
    for name, result in results.items():
        if name != DENSE:
            share = result.outcome.flips
            goal = "<= half of flips_paper" if name == KVCOMM else ""
            found.append(Figure(f"flips_{name}", share.value, "share", (share.low, share.high), goal))
            found.append(Figure(f"changed_{name}", result.outcome.changed.value, "share"))
    return found


if __name__ == "__main__":
    sys.exit(main())
