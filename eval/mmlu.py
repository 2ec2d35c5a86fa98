"""What reuse does to a team's answers on MMLU.

    python -m eval.mmlu --data FOLDER [--limit N] [--modes dense,kvcomm,paper] [--agents 2..5] [--topology full]

The answer of the team is the most probable letter as the referee's first token; what its text says is given beside it.
A letter flip is a question where that letter is not the dense run's, whether either is right or wrong.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

from eval.command import note
from eval.figures import Figure
from eval.tasks import command
from eval.tasks.analysis import ModeResult
from eval.tasks.mmlu import NUM_SHOTS, Mmlu
from eval.tasks.modes import DENSE, KVCOMM
from eval.tasks.rows import beside, load_rows

MAX_COMPUTED = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    evaluation = command.Evaluation(
        "mmlu", make_task, figures, limit=200, add_options=add_options, max_computed=MAX_COMPUTED
    )
    return command.main(evaluation, arguments)


def add_options(parser: ArgumentParser) -> None:
    """How many examples are shown."""
    parser.add_argument(
        "--shots", type=int, default=NUM_SHOTS, choices=range(6), help="examples of the subject [%(default)s]"
    )


def make_task(options: Namespace) -> Mmlu:
    """With the examples of the dev split: from the hub, the folder, or beside the file."""
    split = Mmlu.shots
    where = beside(split, options.data)
    if options.data is not None and where is None:
        note(f"{options.data} has no {split.file}* beside it: no examples are shown")
        return Mmlu([])
    return Mmlu(load_rows(Mmlu.source, split, where), options.shots)


def figures(results: Mapping[str, ModeResult]) -> list[Figure]:
    """Accuracies, and letters that differ from dense, mode by mode."""
    found = []
    for name, result in results.items():
        outcome = result.outcome
        for label, share in (("accuracy", outcome.accuracy), ("text_accuracy", outcome.otherwise)):
            found.append(Figure(f"{label}_{name}", share.value, "share", (share.low, share.high)))
        found.append(Figure(f"macro_{name}", outcome.macro or 0.0, "share"))
        found.append(Figure(f"text_macro_{name}", outcome.macro_otherwise or 0.0, "share"))
    for name, result in results.items():
        if name != DENSE:
            changed, is_own = result.outcome.changed, name == KVCOMM
            label, goal = ("letter_flips", "<= 0.03") if is_own else (f"letter_flips_{name}", "")
            found.append(Figure(label, changed.value, "share", (changed.low, changed.high), goal))
    return found


if __name__ == "__main__":
    sys.exit(main())
