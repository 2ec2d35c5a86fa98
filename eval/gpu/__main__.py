"""What a GPU makes of kvcomm, in one command and under eight minutes.

    python -m eval.gpu [--model PATH] [--dtype bfloat16] [--minutes 7.5] [--json]
    python -m eval.gpu --device cpu --quick          without a GPU: all parts on tiny sizes, kernels interpreted

- self_test: do the Triton kernels compute on this device what they should? How long does compiling them take?
- kernels: every kernel against its reference, and its bandwidth as a share of a plain copy.
- passes: prefill, decoding of 1, 8 and 32 rows, prefix hits; transformers alone beside them.
- paper: first tokens in the setting of KVCOMM's tables, dense, exact, moved, read along.
- graphs: the model's MLPs as they are, compiled, and as a CUDA graph.

Each part is a process of its own with a share of the time. At its end it begins nothing more, and is stopped soon
after; what it has found until then counts. A part that fails or crashes leaves the others alone; `config.parts` says
of each part whether it was done, cut, skipped or failed, and why.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.command import note
from eval.ending import ended_in_order, temporary_files_in
from eval.figures import Figure, Report
from eval.gpu.parts import PARTS, run_part
from eval.gpu.records import Found
from eval.ttft.first_tokens import COLUMNS
from eval.ttft.grid import Grid, GridReport
from eval.workload import add_sizes, make_parser, parse

SIZES = {
    "context_tokens": 4096,
    "prefill_tokens": 2048,
    "decode_tokens": 1024,
    "tail_tokens": 32,
    "new_tokens": 33,
    "layers": 8,
    "query_heads": 32,
    "key_heads": 8,
    "head_dim": 128,
    "copy_mb": 1024,
    "agents": 5,
    "role_tokens": 512,
    "question_tokens": 1024,
    "output_tokens": 512,
    "warm": 2,
    "rounds": 2,
    "pool_tokens": 40_960,
}
SMALL_SIZES = {
    "context_tokens": 96,
    "prefill_tokens": 64,
    "decode_tokens": 24,
    "tail_tokens": 8,
    "new_tokens": 4,
    "layers": 2,
    "query_heads": 4,
    "key_heads": 2,
    "head_dim": 64,
    "copy_mb": 8,
    "agents": 2,
    "role_tokens": 24,
    "question_tokens": 48,
    "output_tokens": 64,
    "warm": 2,
    "rounds": 1,
    "pool_tokens": 4096,
}
GRACE = 0.15
"""Of its time, in which a part that looks at the clock is to come to its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    if options.part is not None:
        run_part(options.part, options, options.seconds, options.records)
        return 0
    if options.device is None:
        sys.stderr.write("error: no CUDA device here; --device cpu --quick shows that all parts run\n")
        return 1
    with ended_in_order():
        found = _run_parts(given, options)
    report = _report(found, options)
    report.emit(as_json=options.json)
    report.save(options.out)
    return 0


def _options(arguments: Sequence[str]) -> Namespace:
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--quick", action="store_true")
    small = first.parse_known_args(arguments)[0].quick

    parser = make_parser("gpu", "What a GPU makes of kvcomm: kernels, passes, first tokens, graphs.")
    parser.allow_abbrev = False
    parser.set_defaults(dtype=None, device="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--attention", default="auto", help="back end of passes and first tokens [%(default)s]")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together [%(default)s]")
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), metavar="A,B", help="some parts only")
    hidden = parser.add_argument_group("of a part's own process")
    hidden.add_argument("--part", choices=PARTS, help="the part to do")
    hidden.add_argument("--seconds", type=float, default=60.0, help="its time")
    hidden.add_argument("--records", type=Path, metavar="FILE", help="what it finds")
    add_sizes(parser, **(SMALL_SIZES if small else SIZES))
    options = parse(parser, arguments, repeats=5, quick_repeats=1)
    options.small = small
    return options


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ArgumentTypeError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


def _run_parts(arguments: Sequence[str], options: Namespace) -> dict[str, Found]:
    """Each part gets its share of what is left, so that later ones have what earlier ones did not need."""
    end = time.monotonic() + 60 * options.minutes
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(options.parts):
            shares = [PARTS[each].share for each in options.parts[index:]]
            seconds = max(0.0, end - time.monotonic()) * shares[0] / sum(shares)
            note(f"{name}: {seconds:.0f} s at most")
            file = Path(folder) / f"{name}.jsonl"
            start = time.monotonic()
            ended = _run_one(name, arguments, options, seconds, file)
            found[name] = Found.read(file)
            found[name].settings["seconds"] = round(time.monotonic() - start, 1)
            if ended is None:
                found[name].cut.append(f"it was stopped after {seconds:.0f} s")
            elif ended:
                how = f"signal {-ended}" if ended < 0 else f"code {ended}"
                found[name].failed.append(f"its process ended with {how}")
            note(f"  {found[name].state}: {len(found[name].figures)} figures")
    return found


def _run_one(name: str, arguments: Sequence[str], options: Namespace, seconds: float, file: Path) -> int | None:
    """Do a part in a process of its own: its exit code, or None where it had to be stopped."""
    own = ["--part", name, "--seconds", str(seconds * (1 - GRACE)), "--records", str(file), "--device", options.device]
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.gpu", *arguments, *own],
        env={**_environment(name, options.device), **temporary_files_in(file.parent)},
        stdout=2,  # what a part says is progress
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(name: str, device: str) -> Mapping[str, str]:
    """Without a GPU kernels are interpreted, in the parts that ask for kernels by name."""
    is_interpreted = PARTS[name].is_interpreted and torch.device(device).type == "cpu"
    return {**os.environ, "TRITON_INTERPRET": "1"} if is_interpreted else os.environ


def _report(found: Mapping[str, Found], options: Namespace) -> Report:
    states = [part.state for part in found.values()]
    counts = [Figure(f"parts_{state}", states.count(state), "parts") for state in ("done", "cut", "skipped")]
    counts.append(Figure("parts_failed", states.count("failed"), "parts", goal="0"))
    own = {"json", "out", "part", "seconds", "records"}
    config: dict[str, Any] = {name: value for name, value in vars(options).items() if name not in own}
    config["data"] = None if options.data is None else options.data.name
    config["device_name"] = torch.cuda.get_device_name(options.device) if "cuda" in options.device else options.device
    config["parts"] = {name: part.to_json() for name, part in found.items()}
    figures = [*counts, *(figure for part in found.values() for figure in part.figures)]
    samples = {name: values for part in found.values() for name, values in part.samples.items()}
    rows = tuple(row for part in found.values() for row in part.rows)
    return GridReport("gpu", figures, config, samples, Grid(("team", *COLUMNS), rows))


if __name__ == "__main__":
    sys.exit(main())
