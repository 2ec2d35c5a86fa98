"""The prior that ships with a model: pairs measured over unlike workloads, for rungs that need no anchors.

    python -m eval.prior --data FOLDER [--workload W[=N] ...] [--requests N] [--fresh] --out FILE

Each workload is served exactly, by a tenant of its own that is given time to measure, after every request, what each
rung would have cost; nothing is moved meanwhile. Pairs say in which workload they were measured, so that an evaluation
can leave its own one out. With them come the weights by which rungs choose tokens, the mean over workloads. The file is
written after every workload, and one that it has already is not measured again.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from eval.command import note, positive
from eval.firstday.workloads import WORKLOADS, Wanted, Workload, make_workload
from kvcomm import Engine, KVCommError, ReusePolicy
from kvcomm.lab.bounds import Level, Pair, pairs_of
from kvcomm.lab.moving import TURNED
from kvcomm.lab.priors import Prior, head_weights, read_prior, require_prior_fits, write_prior

POLICY = ReusePolicy(max_divergence=1e-12, confidence=0.5, rungs=TURNED)
"""Nothing keeps this bound, so everything is computed exactly and measured."""

Weights = tuple[float, ...]
DEFAULT_REQUESTS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with Engine.load(options.model, progress=True, prior=None) as engine:
            prior = _known(engine, options)
            for name, num_requests in options.workload or [(name, options.requests) for name in WORKLOADS]:
                if name not in prior.pairs:
                    wanted = Wanted(engine, options.data, num_requests, options.seed, options.max_new_tokens)
                    prior = _with(prior, name, *measure(engine, make_workload(name, wanted)))
                    write_prior(prior, options.out, name=options.model)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    note(f"pairs in {options.out}: " + ", ".join(f"{name} {len(pairs)}" for name, pairs in prior.pairs.items()))
    return 0


def measure(engine: Engine, workload: Workload) -> tuple[tuple[Pair, ...], Weights | None]:
    """Serve the requests of a workload one by one; its pairs, and what it tells about heads."""
    tenant = f"prior {workload.name}"
    group = workload.team.group(engine, policy=POLICY, tenant=tenant, read_along=False)
    for number, inputs in enumerate(workload.inputs, start=1):
        note(f"{workload.name}: request {number} of {len(workload.inputs)}")
        group.run(rounds=1, **{**workload.team.inputs, **inputs})
        engine.wait_idle()
    found = tuple(pairs_of(engine, Level.POOL, tenant=tenant)), head_weights(engine, tenant=tenant)
    engine.forget(tenant)
    return found


def _known(engine: Engine, options: Namespace) -> Prior:
    """What an earlier run has measured on this model.

    Raises:
        AnchorFileForeign: it was another model.
    """
    if options.fresh or not options.out.exists():
        return Prior(engine.prior_model, {})
    prior = read_prior(options.out)
    require_prior_fits(prior, engine.prior_model)
    return prior


def _with(prior: Prior, workload: str, pairs: Sequence[Pair], weights: Weights | None) -> Prior:
    known, count = prior.head_weights, len(prior.pairs)
    if known is not None and weights is not None:
        weights = tuple((count * old + new) / (count + 1) for old, new in zip(known, weights, strict=True))
    return Prior(prior.model, {**prior.pairs, workload: tuple(pairs)}, weights or known)


def _workload(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in WORKLOADS:
        raise ArgumentTypeError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    return name, positive(number) if number else DEFAULT_REQUESTS


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.prior", description="Measure the prior that ships with a model.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
    parser.add_argument(
        "--workload", action="append", type=_workload, metavar="W[=N]", help="with N requests; may come again [all]"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder of data, or a part of one [the hub]")
    parser.add_argument(
        "--requests", type=positive, default=DEFAULT_REQUESTS, metavar="N", help="of each of all [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the choice of rows [%(default)s]")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="of an answer at most [the team's]")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew, whatever the file has")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
