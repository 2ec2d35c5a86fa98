"""Replay traces on clusters of simulated workers: what routers make of hits, first tokens and bytes on the network.

    python -m eval.cluster --trace FILE.jsonl.gz [--trace FILE ...] [--workers 1,8,64,1000] [--tier] [--json]
    python -m eval.cluster --measure                    the costs of one real worker, for `eval.cluster.costs`

Every router meets the same arrivals, as fast as keeps a cluster that is routed by prefix hash busy for `--utilisation`
of its time; the utilisation of the others is what they make of it. What is simulated and what is left out is said in
`eval.cluster.simulation`, whose routers these are in `eval.cluster.routers`. Figures, per trace, workers and router:

- hit_rate: prompt tokens that the worker held itself, of all; tier_rate: those that it got from the tier.
- ttft_p50_s, p90, p99: from arrival to first token.
- utilisation: share of the time that workers computed; spread: busiest worker over the mean.
- read_gb, written_gb: between workers and tier.

`hit_gain` and `p90_gain` are those of our router over prefix hash, the least of all traces and of all clusters of 64
workers and more; `..._over_ROUTER` likewise over the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.cluster.caches import SharedTier
from eval.cluster.costs import SMOLLM2, Costs
from eval.cluster.routers import ROUTERS
from eval.cluster.simulation import Outcome, Simulation
from eval.cluster.workload import Workload, beginnings, make_workload
from eval.command import add_outputs, finish, note, positive
from eval.figures import Figure, Report
from kvcomm.errors import KVCommError
from kvcomm.lab.load.trace_file import Trace, TraceError, read_trace

BASELINE, OURS = "prefix_hash", "ours"
LARGE = 64
"""Workers of a cluster that the goals are about, and more."""

CALIBRATIONS = 2
REQUESTS_PER_WORKER = 100
QUICK_REQUESTS = 2_000
GOALS = {"hit_gain": 1.05, "p90_gain": 1.1}


class Settings(NamedTuple):
    """What all clusters of a run have in common."""

    routers: tuple[str, ...]
    capacity_tokens: int
    utilisation: float
    costs: Costs
    has_tier: bool
    copies: int | None
    seed: int


class Row(NamedTuple):
    """One router on one cluster with one trace."""

    trace: str
    num_workers: int
    router: str
    outcome: Outcome

    @property
    def name(self) -> str:
        """As figures are called."""
        return f"{self.trace}_{self.num_workers}_{self.router}"


def simulate(name: str, trace: Trace, num_workers: int, settings: Settings) -> list[Row]:
    """All routers on one cluster."""
    num_requests = len(beginnings(trace).requests)
    copies = settings.copies or max(1, -(-num_workers * REQUESTS_PER_WORKER // num_requests))
    workload = make_workload(trace, copies=copies, seed=settings.seed)

    def run(router: str, speed: float) -> Outcome:
        return Simulation(
            workload,
            ROUTERS[router],
            settings.costs,
            num_workers=num_workers,
            capacity_tokens=settings.capacity_tokens,
            speed=speed,
            seed=settings.seed,
            tier=SharedTier() if settings.has_tier else None,
        ).run()

    speed = speed_for(workload, num_workers, settings, lambda speed: run(BASELINE, speed))
    rows = []
    for router in settings.routers:
        rows.append(Row(name, num_workers, router, run(router, speed)))
        note(f"{name}, {num_workers} workers, {copies} x {num_requests} requests: {told(rows[-1])}")
    return rows


def speed_for(workload: Workload, num_workers: int, settings: Settings, run: Callable[[float], Outcome]) -> float:
    """Seconds of the trace per second at which the baseline's workers are busy as long as wanted.

    What they compute depends on the speed a little, because what is under way is no hit yet: hence in rounds.
    """
    busy = sum(settings.costs.prefill_s(0, arrival.num_tokens) for arrival in workload.arrivals)
    for _ in range(CALIBRATIONS):
        busy = float(run(_speed(workload, num_workers, settings.utilisation, busy)).busy_s.sum())
    return _speed(workload, num_workers, settings.utilisation, busy)


def _speed(workload: Workload, num_workers: int, utilisation: float, busy_s: float) -> float:
    return utilisation * num_workers * workload.span / max(busy_s, 1e-12)


def figures_of(row: Row) -> list[Figure]:
    """All figures of one router."""
    outcome, name = row.outcome, row.name
    percentiles = zip((50, 90, 99), percentiles_of(outcome), strict=True)
    return [
        Figure(f"hit_rate_{name}", 100 * outcome.hit_rate, "%"),
        Figure(f"tier_rate_{name}", 100 * outcome.tier_tokens / max(outcome.prompt_tokens, 1), "%"),
        *(Figure(f"ttft_p{each}_s_{name}", value, "s") for each, value in percentiles),
        Figure(f"utilisation_{name}", outcome.utilisation, ""),
        Figure(f"spread_{name}", float(outcome.busy_s.max() / max(outcome.busy_s.mean(), 1e-12)), "x"),
        Figure(f"read_gb_{name}", outcome.bytes_read / 1e9, "GB"),
        Figure(f"written_gb_{name}", outcome.bytes_written / 1e9, "GB"),
    ]


def gains_of(rows: Sequence[Row]) -> list[Figure]:
    """Our router over each of the others: every one of them, and the least of those on large clusters."""
    by_cluster: dict[tuple[str, int], dict[str, Outcome]] = {}
    for row in rows:
        by_cluster.setdefault((row.trace, row.num_workers), {})[row.router] = row.outcome
    figures: list[Figure] = []
    least: dict[str, float] = {}
    for (trace, num_workers), outcomes in by_cluster.items():
        if OURS not in outcomes:
            continue
        for router in (each for each in outcomes if each != OURS):
            for kind, value in gains(outcomes[OURS], outcomes[router]).items():
                over = kind if router == BASELINE else f"{kind}_over_{router}"
                figures.append(Figure(f"{over}_{trace}_{num_workers}", value, "x"))
                if num_workers >= LARGE:
                    least[over] = min(value, least.get(over, value))
    goals = {name: f">= {goal}" for name, goal in GOALS.items()}
    return [*figures, *(Figure(name, value, "x", None, goals.get(name, "")) for name, value in least.items())]


def gains(ours: Outcome, other: Outcome) -> Mapping[str, float]:
    """How much more is hit, and how much sooner nine of ten first tokens are there."""
    return {
        "hit_gain": ours.hit_rate / max(other.hit_rate, 1e-12),
        "p90_gain": percentiles_of(other)[1] / max(percentiles_of(ours)[1], 1e-12),
    }


def percentiles_of(outcome: Outcome) -> tuple[float, float, float]:
    """Seconds to the first token of 50, 90 and 99 per cent of the requests."""
    p50, p90, p99 = np.percentile(outcome.ttft_s, (50, 90, 99)).tolist()
    return p50, p90, p99


def told(row: Row) -> str:
    """A row for people."""
    outcome = row.outcome
    p50, p90, p99 = percentiles_of(outcome)
    return (
        f"{row.router}: hit {100 * outcome.hit_rate:.1f} %, busy {100 * outcome.utilisation:.0f} %, "
        f"first token {p50:.1f} s, {p90:.1f} s, {p99:.1f} s, read {outcome.bytes_read / 1e9:.0f} GB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return _measure(options.model) if options.measure else finish(lambda: _report(options), options)


def _measure(model: str) -> int:
    """Print the costs of a real worker; returns the exit code."""
    from eval.cluster.measuring import measured  # needs torch, which simulating does without

    try:
        sys.stdout.write(f"{measured(model)}\n")
    except KVCommError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _report(options: argparse.Namespace) -> Report:
    if not options.trace:
        raise TraceError("--trace FILE is missing: a mooncake or agentic .jsonl[.gz]")
    settings = _settings(options)
    rows = []
    traces = []
    for file in options.trace:
        trace = read_trace(file, limit=options.limit)
        if options.quick:
            trace = replace(trace, requests=trace.requests[:QUICK_REQUESTS])
        traces.append({"file": file.name, "sha256": trace.sha256, "requests": len(trace.requests)})
        for num_workers in options.workers:
            rows += simulate(trace.format, trace, num_workers, settings)
    figures = [figure for row in rows for figure in figures_of(row)]
    config = {
        "traces": traces,
        "workers": list(options.workers),
        "limit": options.limit,
        "quick": options.quick,
        **settings._asdict(),
        "routers": list(settings.routers),
        "costs": asdict(settings.costs),
    }
    return Report("cluster", [*figures, *gains_of(rows)], config)


def _settings(options: argparse.Namespace) -> Settings:
    costs = replace(SMOLLM2, network_bytes_s=options.gbit * 1e9 / 8)
    return Settings(
        options.routers,
        options.capacity_tokens,
        options.utilisation,
        costs,
        options.tier,
        options.copies,
        options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.cluster", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help="a mooncake or agentic .jsonl[.gz]")
    parser.add_argument("--workers", type=_counts, default=(1, 8, 64, 1000), metavar="N,N", help="[1,8,64,1000]")
    parser.add_argument("--routers", type=_routers, default=tuple(ROUTERS), metavar="NAME,NAME", help="[all]")
    parser.add_argument("--utilisation", type=_share, default=0.7, help="of a cluster routed by hash [%(default)s]")
    parser.add_argument("--capacity-tokens", type=positive, default=500_000, help="KV of one worker [%(default)s]")
    parser.add_argument("--tier", action="store_true", help="workers share a tier that holds everything")
    parser.add_argument("--gbit", type=_amount, default=10.0, help="network of one worker, Gbit/s [%(default)s]")
    parser.add_argument("--copies", type=positive, metavar="N", help="independent populations [enough for the workers]")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N lines of each file")
    parser.add_argument("--quick", action="store_true", help=f"only the first {QUICK_REQUESTS} requests of each trace")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--measure", action="store_true", help="print the costs of a real worker, and nothing else")
    parser.add_argument("--model", default="smollm2-135m", help="of --measure [%(default)s]")
    add_outputs(parser, "cluster")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _amount(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1: the queues would grow for ever")
    return value


def _routers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in ROUTERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown router {unknown[0]!r}; there are {', '.join(ROUTERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
