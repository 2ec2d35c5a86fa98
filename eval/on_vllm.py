"""kvcomm inside vLLM: first tokens from the tier and with moved text, equal tokens, and that nobody else is touched.

    python -m eval.on_vllm [--python PATH] [--model smollm2-135m] [--repeats N] [--quick] [--json] [--out FILE]

Runs in an environment that has vLLM beside kvcomm (`scripts/setup-env --integration vllm`); --python names one's
interpreter. CPU seconds stand beside wall time, ratios are of the same run. `same_tokens` compares vLLM's answers with
those of kvcomm's own engine to the same prompts, in the same order, where both had the same plan; `same_plans` says how
often that was.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.figures import Figure, Report, stdout_kept
from kvcomm import KVCommError

if TYPE_CHECKING:
    from eval.on_vllm_runs import Cost

SAFE_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
QUICK = {"repeats": 2, "plain": 60, "storms": 2, "rag": 2, "teams": 1}
FULL = {"repeats": 7, "plain": 1000, "storms": 8, "rag": 8, "teams": 2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parse(arguments)
    if options.python is not None:
        return _elsewhere(options.python, sys.argv[1:] if arguments is None else arguments)
    os.environ.update({key: os.environ.get(key, value) for key, value in SAFE_ENVIRONMENT.items()})
    try:
        with stdout_kept():  # vLLM logs there
            report = measure(options)
        if options.out is not None:
            report.save(options.out)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    report.emit(as_json=options.json)
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would be waited for


def measure(options: Namespace) -> Report:
    """All figures."""
    from eval import on_vllm_runs as runs

    with tempfile.TemporaryDirectory() as folder:
        bench = runs.Bench(options.model, Path(folder))
        figures = [
            *_costs(bench.first_tokens(options.repeats)),
            *_isolation(bench.isolation(options.plain)),
            *_storms(bench.storms(options.storms)),
            *_same(bench.same(options.rag, options.teams, learns=not options.quick)),
        ]
    config = {key: value for key, value in vars(options).items() if key not in ("json", "out", "python")}
    return Report("on_vllm", figures, {**config, "vllm": bench.version, "kv_difference": bench.difference})


def _costs(costs: list[dict[str, Cost]]) -> list[Figure]:
    from kvcomm.lab.timings import Samples

    figures = []
    for kind in ("cpu_s", "wall_s"):
        samples = {name: Samples(tuple(getattr(each[name], kind) for each in costs)) for name in costs[0]}
        mark = "" if kind == "cpu_s" else "_wall"
        for name, over, goal in (
            ("tier", "cold", "<= 0.25"),
            ("moved", "cold", "<= 0.40"),
            ("tier", "hit", "<= 1.2"),
        ):
            ratio = samples[name].per(samples[over])
            wanted = goal if kind == "cpu_s" else ""
            figures.append(Figure(f"{name}_over_{over}{mark}", ratio.median, "x", ratio.quartiles, wanted))
        figures += [Figure(f"{name}_{kind}", each.median, "s", each.quartiles) for name, each in samples.items()]
    shares = [each["moved"].num_moved / each["moved"].num_tokens for each in costs]
    figures.append(Figure("moved_share", min(shares), "share", None, ">= 0.85"))
    return figures


def _isolation(found: tuple[int, int, int]) -> list[Figure]:
    num_plain, num_tainted, num_approximate = found
    return [
        Figure("tainted", num_tainted, "requests", None, "0"),
        Figure("plain_requests", num_plain, "requests"),
        Figure("approximate_requests", num_approximate, "requests"),
    ]


def _storms(found: tuple[int, int, int, int]) -> list[Figure]:
    num_answers, num_moved, num_wrong, num_leaked = found
    return [
        Figure("wrong", num_wrong, "answers", None, "0"),
        Figure("leaked", num_leaked, "blocks", None, "0"),
        Figure("disturbed_answers", num_answers, "answers"),
        Figure("disturbed_moved", num_moved, "answers"),
    ]


def _same(found: tuple[float, float, int, int, int, float]) -> list[Figure]:
    same, plans, moved, audits, violations, delta = found
    error = 2 * (delta * (1 - delta) / audits) ** 0.5 if audits else 0.0
    return [
        Figure("same_tokens", same, "share", None, "1"),
        Figure("same_plans", plans, "share"),
        Figure("moved_requests", moved, "requests"),
        Figure("violations", violations / audits if audits else 0.0, "share", None, f"<= {delta + error:.3f}"),
        Figure("audits", audits, "requests"),
    ]


def _elsewhere(python: str, arguments: Sequence[str]) -> int:
    """Run this in another interpreter; returns its exit code."""
    kept, skip = [], False
    for each in arguments:
        if skip or each == "--python" or each.startswith("--python="):
            skip = each == "--python"
            continue
        kept.append(each)
    environment = {**os.environ, **SAFE_ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    try:
        return subprocess.run([python, "-m", "eval.on_vllm", *kept], env=environment, check=False).returncode
    except OSError as error:
        sys.stderr.write(f"error: --python {python}: {error.strerror}\n")
        return 1


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m eval.on_vllm", description="kvcomm inside vLLM, in figures.")
    parser.add_argument("--python", metavar="PATH", help="interpreter of an environment with vLLM [this one]")
    parser.add_argument("--model", default="smollm2-135m", help="packaged name or folder [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="small counts, and nothing learned")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write figures and settings there as well")
    for name, told in (
        ("repeats", "first tokens of each kind"),
        ("plain", "plain requests between approximate ones"),
        ("storms", "batches that are preempted, aborted and robbed of what was prepared"),
        ("rag", "questions over documents that are compared"),
        ("teams", "questions to five agents that are compared"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{told} [{FULL[name]}; --quick {QUICK[name]}]")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        elif getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
