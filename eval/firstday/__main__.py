"""What a new user's first requests get out of moved KV.

    python -m eval.firstday --data FOLDER [--workload W] [--prior | --no-prior] [--bound EPSILON,CONFIDENCE ...]
                            [--requests N] [--methods cacheblend,epic,paper]

A fresh engine, requests one after the other without a pause. When is text moved first, how much of what could be moved
is, does the bound hold, what is gained until the first token, and how much time goes into learning? Every approximate
call is held against exact computation here, whatever the engine audits by itself. With the prior it is the one that was
made without the workload. An interrupted run goes on with the part, workload by workload, that it had not finished.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

from eval.command import note
from eval.figures import Report
from eval.firstday.figures import figures_of, samples_of
from eval.firstday.methods import require_known
from eval.firstday.parts import CONFIG, RAG, Evaluation, parts_of
from eval.firstday.records import Part
from eval.firstday.workloads import WORKLOADS, Wanted, Workload, make_workload
from eval.tasks.progress import Phases
from kvcomm import Engine, KVCommError
from kvcomm.errors import InvalidRequest
from kvcomm.lab.bounds import Bound
from kvcomm.lab.priors import find_prior, read_prior, require_prior_fits

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        report = evaluate(options)
        report.emit(as_json=options.json)
        report.save(options.out / "report.json")
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on with the part that was not finished\n")
        return 130
    return 0


def evaluate(options: Namespace) -> Report:
    """Every part that is asked for, as far as it is not there yet."""
    bounds, methods = _checked(options)
    with Engine.load(options.model, progress=True, config=CONFIG, prior=None) as twin, Phases() as phases:
        workloads = _workloads(options, twin)
        prior = find_prior(twin.prior_model) if options.prior_file is None else read_prior(options.prior_file)
        if prior is not None:
            require_prior_fits(prior, twin.prior_model)
        parts = parts_of(workloads, bounds, options.prior, prior)
        evaluation = Evaluation(twin, workloads, prior, methods, options.out, fresh=options.fresh)
        served = {part: evaluation.serve(part, phases) for part in parts}
    return Report("firstday", figures_of(served), _settings(options, parts), samples_of(served))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.firstday", description="What first requests get out of moved KV.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
    parser.add_argument(
        "--workload", action="append", metavar="W", help=f"one of {', '.join(WORKLOADS)}; may come again [{ALL}]"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder of data, or a part of one [the hub]")
    parser.add_argument(
        "--prior", action=BooleanOptionalAction, help="with the model's prior, without the workload [both]"
    )
    parser.add_argument("--prior-file", type=Path, metavar="FILE", help="a prior [the one that ships with the model]")
    parser.add_argument(
        "--bound",
        action="append",
        metavar="NATS,P",
        help="largest divergence and confidence; may come again [0.05,0.9]",
    )
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="of each workload [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows; 0: the first ones [%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer at most [the team's]")
    parser.add_argument("--methods", default="", metavar="M,M", help=f"measure others on {RAG}: cacheblend,epic,paper")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever an earlier run has left")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path("out/firstday"), metavar="DIR", help="[%(default)s]")
    return parser


def _checked(options: Namespace) -> tuple[list[Bound], list[str]]:
    """Bounds and methods; what can be refused before a model is loaded is refused here."""
    for name in ("requests", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in options.workload or ():
        if name not in {*WORKLOADS, ALL}:
            raise InvalidRequest(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)} and {ALL}")
    if options.data is not None and not options.data.is_dir():
        raise InvalidRequest(f"--data {options.data}: no such folder")
    methods = [name.strip() for name in options.methods.split(",") if name.strip()]
    require_known(methods)
    return [_bound(text) for text in options.bound or ["0.05,0.9"]], methods


def _bound(text: str) -> Bound:
    try:
        epsilon, confidence = map(float, text.split(","))
    except ValueError:
        raise InvalidRequest(f"--bound is NATS,CONFIDENCE, such as 0.05,0.9, not {text!r}") from None
    if not (0 < epsilon < float("inf") and 0 < confidence < 1):
        raise InvalidRequest(f"--bound needs nats above 0 and a confidence between 0 and 1, got {text!r}")
    return Bound(epsilon, 1 - confidence)


def _workloads(options: Namespace, engine: Engine) -> dict[str, Workload]:
    """Those asked for; of all, those whose data are there."""
    wanted = Wanted(engine, options.data, options.requests, options.seed, options.max_new_tokens)
    names = options.workload or [ALL]
    if ALL not in names:
        return {name: make_workload(name, wanted) for name in dict.fromkeys(names)}
    found, missing = {}, []
    for name in WORKLOADS:
        try:
            found[name] = make_workload(name, wanted)
        except InvalidRequest as error:
            note(f"left out: {error}")
            missing.append(str(error))
    if not found:
        raise InvalidRequest(f"no workload has its data: {'; '.join(missing)}")
    return found


def _settings(options: Namespace, parts: Sequence[Part]) -> dict[str, object]:
    left_out = {"json", "out", "fresh", "data", "workload", "bound", "prior_file"}
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    return {**given, "data": None if options.data is None else options.data.name, "parts": [p.label for p in parts]}


if __name__ == "__main__":
    sys.exit(main())
