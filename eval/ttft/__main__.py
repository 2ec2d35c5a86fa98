"""Times of a team that reads the same texts behind different roles: kvcomm against transformers alone.

    python -m eval.ttft --data TEXTS [--setting paper] [--anchors FOLDER]       first tokens of five agents, bounded
    python -m eval.ttft --data TEXTS --setting table [--dtype bfloat16]         first tokens by size of role and output
    python -m eval.ttft --data TEXTS --setting scaling                          curves to 16 agents and 8,192 tokens
    python -m eval.ttft --data QUESTIONS --setting end-to-end [--anchors DIR]   whole teams, decoding included

What each setting compares with what, and where it departs from the publication it follows, is said in its own module:
`eval.ttft.paper`, `table`, `scaling` and `end_to_end`. Its sizes are options, listed by `--setting NAME --help`; with
--quick they are small, so that a run takes a minute or two, and figures are a first impression only.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.ttft import end_to_end, paper, scaling, table
from eval.workload import Measure, add_sizes, make_parser, parse, run


class Setting(NamedTuple):
    """One thing to measure.

    Attributes:
        summary: for `--help`.
        sizes, quick_sizes: defaults of its size options, in full and with --quick.
        repeats, quick_repeats: likewise.
        add_options: adds what is no size; told whether --quick was given.
        reads_questions: whether `--data` holds questions instead of text.
    """

    summary: str
    measure: Measure
    sizes: Mapping[str, int]
    quick_sizes: Mapping[str, int]
    repeats: int
    quick_repeats: int
    add_options: Callable[[ArgumentParser, bool], None] = lambda parser, quick: None
    reads_questions: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    # Sizes and their defaults depend on these two, so they are looked at before all others.
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--setting", default="paper")
    first.add_argument("--quick", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    setting = SETTINGS.get(chosen.setting, SETTINGS["paper"])

    parser = make_parser("ttft", setting.summary)
    parser.allow_abbrev = False
    parser.add_argument("--setting", choices=SETTINGS, default="paper", help="what to measure [%(default)s]")
    setting.add_options(parser, chosen.quick)
    add_sizes(parser, **(setting.quick_sizes if chosen.quick else setting.sizes))
    options = parse(parser, arguments, repeats=setting.repeats, quick_repeats=setting.quick_repeats)
    if setting.reads_questions:
        options.questions, options.data = options.data, None
    return run(options, setting.measure)


def _paper_options(parser: ArgumentParser, quick: bool) -> None:
    parser.add_argument("--anchors", type=Path, metavar="FOLDER", help="keep calibration there, or take it")
    parser.add_argument("--along-only", action="store_true", help="move nothing, measure agents that read along")


def _table_options(parser: ArgumentParser, quick: bool) -> None:
    roles, outputs = ((64, 128), (64, 128)) if quick else (table.ROLE_SIZES, table.OUTPUT_SIZES)
    for flag, default, what in (("--role-sizes", roles, "roles"), ("--output-sizes", outputs, "outputs")):
        listed = ",".join(map(str, default))
        parser.add_argument(flag, type=_sizes, default=default, metavar="N,N", help=f"tokens of {what} [{listed}]")


def _end_to_end_options(parser: ArgumentParser, quick: bool) -> None:
    parser.add_argument(
        "--anchors", type=Path, metavar="DIR", help="move KV as well: take calibration there, or keep it"
    )
    parser.add_argument("--team", default="gsm8k", help="a packaged team or a .toml file [%(default)s]")
    parser.add_argument("--max-divergence", type=float, default=0.05, metavar="NATS", help="of moved KV [%(default)s]")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of moved KV [%(default)s]")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ArgumentTypeError(f"{text!r} is no list of positive numbers, as 64,128")
    return sizes


SETTINGS = {
    "paper": Setting(
        "First tokens of a team, moved KV and agents that read along against dense prefills.",
        paper.measure,
        {"agents": 5, "role_tokens": 512, "question_tokens": 1000, "output_tokens": 512, "warm": 3, "calibration": 20},
        {"agents": 5, "role_tokens": 64, "question_tokens": 96, "output_tokens": 48, "warm": 3},
        repeats=5,
        quick_repeats=2,
        add_options=_paper_options,
    ),
    "table": Setting(
        "First tokens of three agents by size of role and output: dense, exact prefixes, moved KV, read along.",
        table.measure,
        {"agents": 3, "question_tokens": 1000, "warm": 2},
        {"agents": 3, "question_tokens": 128, "warm": 1},
        repeats=3,
        quick_repeats=1,
        add_options=_table_options,
    ),
    "scaling": Setting(
        "First tokens of a growing team: dense, exact prefixes, moved KV, read along; the exponents of their growth.",
        scaling.measure,
        {"agents": 16, "prompt_tokens": 8192, "role_tokens": 512, "question_tokens": 512, "warm": 1},
        {"agents": 6, "prompt_tokens": 1024, "role_tokens": 96, "question_tokens": 128, "warm": 1},
        repeats=3,
        quick_repeats=1,
    ),
    "end-to-end": Setting(
        "Whole runs of a team, decoding included: transformers agent by agent against a kvcomm group. Here --data "
        "holds questions: a .jsonl file (field 'question'), or one a line; by default those that come with kvcomm.",
        end_to_end.measure,
        {"answer_tokens": 64, "in_flight": 4, "warm": 4, "calibration": 28},
        {"answer_tokens": 64, "in_flight": 2, "warm": 4, "calibration": 28},
        repeats=8,
        quick_repeats=2,
        add_options=_end_to_end_options,
        reads_questions=True,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
