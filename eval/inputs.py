"""A data set's rows as the inputs of its team, the file that `kvcomm tune --data` takes.

    python -m eval.inputs mmlu --data FOLDER [--train [FILE]] [--limit N] [--seed S] --out inputs.jsonl

One object a line with the texts that the team's prompts ask for: for MMLU a question with its choices, and examples of
its subject. What the evaluation asks by default are the first rows; --train takes others where the data set has some,
and of a random choice, by another --seed than 0, few are among the first.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from eval import mmlu
from eval.command import note, positive
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.humaneval import HumanEval
from eval.tasks.rows import chosen, load_rows, load_train_rows
from eval.tasks.task import Row, Task
from kvcomm import KVCommError
from kvcomm.errors import InvalidRequest

BESIDE = Path()
"""--train without a file."""

TASKS: dict[str, Callable[[Namespace], Task]] = {
    "gsm8k": lambda options: Gsm8k(),
    "humaneval": lambda options: HumanEval(),
    "mmlu": mmlu.make_task,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        task = TASKS[options.task](options)
        rows = chosen(_rows(task, options), options.limit, options.seed)
        lines = [json.dumps(dict(task.inputs(row)), ensure_ascii=False) for row in rows]
        options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    note(f"{len(lines)} rows for team {task.team} in {options.out}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.inputs", description="Rows of a data set as inputs of its team.")
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, metavar="PATH", help="file or folder of rows [the hub]")
    parser.add_argument(
        "--train",
        type=Path,
        nargs="?",
        const=BESIDE,
        metavar="FILE",
        help="rows to learn from, in FILE or beside --data, instead of rows to ask",
    )
    parser.add_argument("--limit", type=positive, default=200, metavar="N", help="rows [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows; 0: the first ones [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    mmlu.add_options(parser)
    return parser


def _rows(task: Task, options: Namespace) -> list[Row]:
    source = task.source
    if options.train is None or (options.train == BESIDE and source.train == source.test):
        rows = load_rows(source, source.test, options.data)
    else:
        rows = load_train_rows(source, None if options.train == BESIDE else options.train, options.data)
    if not rows:
        raise InvalidRequest(f"there are no rows in {options.data or source.hub[0]}")
    return task.arrange(rows)


if __name__ == "__main__":
    sys.exit(main())
