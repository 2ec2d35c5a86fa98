"""What reuse does to a team's programs on HumanEval.

    python -m eval.humaneval --data FOLDER [--limit N] [--modes dense,kvcomm,paper] [--agents 2..5]

Programs are run and judged in a sandbox (`eval.sandbox` says what that promises); where the system cannot keep them
apart, the evaluation refuses to start unless --unsafe is given. Their accuracy is pass@1 of the greedy answer; with
--samples N further programs are drawn, and pass@k is estimated from those.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from eval.figures import Figure
from eval.gsm8k import flips
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.humaneval import HumanEval
from eval.tasks.program import add_isolation_option

NUM_SAMPLES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    evaluation = command.Evaluation("humaneval", make_task, figures, 20, NUM_SAMPLES, add_isolation_option)
    return command.main(evaluation, arguments)


def make_task(options: Namespace) -> HumanEval:
    """With what the options say of programs."""
    return HumanEval(unsafe=options.unsafe)


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """pass@1 of the greedy answers, pass@k of those drawn, and flips of all modes but dense."""
    found = []
    for name, result in results.items():
        share = result.outcome.accuracy
        found.append(Figure(f"pass_at_1_{name}", share.value, "share", (share.low, share.high)))
        found += [Figure(f"pass_at_{k}_drawn_{name}", value, "share") for k, value in result.outcome.pass_at.items()]
    return [*found, *flips(results)]


if __name__ == "__main__":
    sys.exit(main())
