"""The prior that ships with a model: pairs measured over unlike workloads, for rungs that need no anchors.

    python -m eval.prior --data FOLDER [--workload W ...] [--requests N] [--out FILE]

Each workload is served exactly on a fresh engine that is given time to measure, after every request, what each rung
would have cost; nothing is moved meanwhile. Pairs say in which workload they were measured, so that an evaluation can
leave its own one out. The weights by which rungs choose tokens are learned on the way, over all workloads in turns. An
interrupted run goes on with the workload that it had not finished.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from eval.firstday.workloads import WORKLOADS, Wanted, Workload, make_workload
from eval.tasks.options import positive
from eval.workload import note
from kvcomm import Engine, KVCommError, ReusePolicy
from kvcomm.align.ladder import TURNED
from kvcomm.align.prior import Prior, write_prior

POLICY = ReusePolicy(max_divergence=1e-12, confidence=0.5, rungs=TURNED)
"""Nothing keeps this bound, so everything is computed exactly and measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with Engine.load(options.model, progress=True, prior=None) as engine:
            workloads = [make_workload(name, _wanted(options, engine)) for name in options.workload or WORKLOADS]
            prior = measure(engine, workloads)
        write_prior(prior, options.out, name=options.model)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    counts = ", ".join(f"{name} {len(pairs)}" for name, pairs in prior.pairs.items())
    note(f"pairs: {counts}; written to {options.out}")
    return 0


def measure(engine: Engine, workloads: Sequence[Workload]) -> Prior:
    """Serve requests of all workloads in turns, and measure."""
    found: dict[str, list[object]] = {workload.name: [] for workload in workloads}
    tenants = {workload.name: f"prior {workload.name}" for workload in workloads}
    groups = {each.name: each.team.group(engine, policy=POLICY, tenant=tenants[each.name]) for each in workloads}
    del found
    turns = zip_longest(*(each.inputs for each in workloads))
    for number, inputs in enumerate(turns, start=1):
        for workload, given in zip(workloads, inputs, strict=True):
            if given is not None:
                note(f"request {number} of {workload.name}")
                _serve(groups[workload.name], workload, given)
                engine.wait_idle()
    heads = engine.reuse.book.heads
    pairs = {name: engine.reuse.book.pool(engine.namespace(tenant)) for name, tenant in tenants.items()}
    weights = [heads(engine.namespace(tenant)).weights for tenant in tenants.values()]
    known = [each for each in weights if each is not None]
    mean = tuple(sum(column) / len(known) for column in zip(*known, strict=True)) if known else None
    return Prior(engine.prior_model, pairs, mean)


def _serve(group: object, workload: Workload, given: Mapping[str, str]) -> None:
    group.run(rounds=1, **{**workload.team.inputs, **given})  # type: ignore[attr-defined]


def _wanted(options: Namespace, engine: Engine) -> Wanted:
    return Wanted(engine, options.data, options.requests, options.seed, options.max_new_tokens)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.prior", description="Measure the prior that ships with a model.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS), help="may come again [all]")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder of data, or a part of one [the hub]")
    parser.add_argument("--requests", type=positive, default=30, metavar="N", help="of each workload [%(default)s]")
    parser.add_argument("--seed", type=int, default=7, help="of the choice of rows [%(default)s]")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="of an answer at most [the team's]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
