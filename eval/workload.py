"""What the timing evaluations share: command line, engine and prompts.

Prompts are random tokens of the ordinary vocabulary unless a file with text is given; how long a pass takes does not
depend on which tokens they are.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.command import add_model, add_outputs, finish, positive
from eval.data_files import rows_of, text_of
from eval.figures import Report
from kvcomm import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import TakeTokens, random_tokens, warm_up

SEED = 0

Measure = Callable[[Engine, TakeTokens, Namespace], Report]


def make_parser(name: str, description: str) -> ArgumentParser:
    """The options that all timing evaluations have."""
    parser = ArgumentParser(prog=f"python -m eval.{name}", description=description)
    add_model(parser)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 [%(default)s]")
    parser.add_argument("--device", help="where to run; by default the GPU if there is one")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts from a text or .jsonl file (field 'text')")
    parser.add_argument("--seed", type=int, default=SEED, help="of random prompts [%(default)s]")
    parser.add_argument("--repeats", type=positive, metavar="N", help="measurements of each figure")
    parser.add_argument("--quick", action="store_true", help="few measurements: for a first impression")
    add_outputs(parser, name)
    return parser


def add_sizes(parser: ArgumentParser, **sizes: int) -> None:
    """Options for sizes, so that a small model can be measured as well."""
    group = parser.add_argument_group("sizes (the figures' goals hold for the defaults)")
    for name, default in sizes.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=positive, default=default, metavar="N", help=f"[{default}]")


def run(options: Namespace, measure: Measure) -> int:
    """Load, measure, print and save. Returns the exit code; kvcomm's own errors become one line on stderr."""

    def measured() -> Report:
        with Engine.load(options.model, dtype=options.dtype, device=options.device, progress=True) as engine:
            take = random_tokens(engine, seed=options.seed)
            if options.data is not None:
                take = text_tokens(engine, options.data)
            warm_up(engine, take)
            return measure(engine, take, options)

    return finish(measured, options)


def settings(engine: Engine, options: Namespace, **more: Any) -> dict[str, Any]:
    """The resolved configuration of a run."""
    given = {name: value for name, value in vars(options).items() if name not in {"json", "out", "quick"}}
    given["data"] = None if options.data is None else options.data.name
    return {
        **given,
        "prompts": "random tokens" if options.data is None else "text",
        "device": str(engine.model.device),
        "attention": engine.attention,
        "torch_threads": torch.get_num_threads(),
        "page_size": engine.config.page_size,
        **more,
    }


def text_tokens(engine: Engine, file: Path) -> TakeTokens:
    """Prompts cut from a text, one behind the other; each lap starts a token later, so that none comes twice.

    Raises:
        InvalidRequest: the file cannot be read, or holds no text.
    """
    tokens = engine.segment(_read_text(file)).token_ids
    if not tokens:
        raise InvalidRequest(f"{file} holds no text to cut prompts from")
    at = lap = 0

    def take(num_tokens: int) -> list[int]:
        nonlocal at, lap
        if at + num_tokens > len(tokens):
            lap += 1
            at = lap
        taken = [tokens[(at + i) % len(tokens)] for i in range(num_tokens)]
        at += num_tokens
        return taken

    return take


def _read_text(file: Path) -> str:
    if ".jsonl" not in file.suffixes:
        return text_of(file)
    return "\n\n".join(rows_of(file, lambda row: str(row["text"]), 'an object with the text "text"'))


def parse(parser: ArgumentParser, arguments: Sequence[str] | None, *, repeats: int, quick_repeats: int) -> Namespace:
    """Parsed options with `repeats` resolved."""
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (quick_repeats if options.quick else repeats)
    return options
