"""What evaluations share as commands: options, progress, and how a run ends. Needs neither torch nor a model.

Progress goes to stderr, figures to stdout, everything to the file of the run.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

from eval.ending import ended_in_order
from eval.figures import Report
from kvcomm.errors import KVCommError


def add_model(parser: ArgumentParser) -> None:
    """--model."""
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")


def add_outputs(parser: ArgumentParser, name: str) -> None:
    """--json, and --out, which is named after the evaluation."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path(f"out/{name}.json"), help="file of the run [%(default)s]")


def positive(text: str) -> int:
    """A number of things of which there must be one, as an option."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{value} is not positive")
    return value


def note(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def finish(measure: Callable[[], Report], options: Namespace) -> int:
    """Measure, print and save. Returns the exit code; kvcomm's own errors become one line on stderr."""
    try:
        with ended_in_order():
            report = measure()
        report.emit(as_json=options.json)
        report.save(options.out)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
