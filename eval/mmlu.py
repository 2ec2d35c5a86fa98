"""What reuse does to a team's answers on MMLU.

    python -m eval.mmlu --data FOLDER [--limit N] [--modes dense,exact,kvcomm] [--agents 2..5] [--topology full]

The answer of the team is the most probable letter as the referee's first token. A letter flip is a question where that
letter is not the dense run's, whether either is right or wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.figures import Figure
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.mmlu import Mmlu
from eval.tasks.modes import DENSE, KVCOMM
from eval.tasks.rows import load_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    return command.main(command.Evaluation("mmlu", make_task, figures, limit=200), arguments)


def make_task(data: Path | None) -> Mmlu:
    """With the examples of the dev split; of a single file there are none."""
    return Mmlu([] if data is not None and data.is_file() else load_rows(Mmlu.source, "dev", data, command.ALL_ROWS))


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """Accuracies, and letters that differ from dense, mode by mode."""
    found = [Figure(f"accuracy_{name}", result.accuracy.value, "share") for name, result in results.items()]
    found += [Figure(f"macro_{name}", result.macro or 0.0, "share") for name, result in results.items()]
    for name, result in results.items():
        if name != DENSE:
            spread, is_own = (result.changed.low, result.changed.high), name == KVCOMM
            found.append(
                Figure(
                    "letter_flips" if is_own else f"letter_flips_{name}",
                    result.changed.value,
                    "share",
                    spread,
                    "<= 0.03" if is_own else "",
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
