"""How far answers on moved KV are from exact ones, and whether the bound holds.

    python -m eval.fidelity --data ANCHORS.jsonl --test TEST.jsonl [--bound] [--answers FILE] [--json]

A team of agents answers every question exactly. Anchors are learned from the first questions of the one file; on
questions of the other every prompt is replayed with its moved segments in several ways, and the divergence from the
exact answer is taken: mean KL in nats over the next 32 tokens, teacher-forced. An edge group is one agent's prompt.
With --bound further questions calibrate each group, and what would be accepted for two bounds is held against them.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.figures import Figure, Report
from eval.team_answers import Run, publish, team_runs
from eval.workload import note, settings
from kvcomm import Engine, KVCommError
from kvcomm.align.calibration import Calibration, Pair
from kvcomm.engine.replay import Outcome
from kvcomm.engine.selectors import Variant

RUNGS = (0.0, 0.25, 0.5)
LADDER = tuple(Variant("token", share, "attention") for share in RUNGS)
COMPARED = (
    Variant("rotate"),
    Variant("paper"),
    *LADDER,
    Variant("token", 0.25, "influence"),
    Variant("token", 0.5, "influence"),
    Variant("token", 0.25, "head"),
    Variant("rotate", 0.15, "deviation"),
    Variant("rotate", 0.5, "deviation"),
)
BOUNDS = ((0.02, 0.05), (0.05, 0.05))
GOALS = {
    "token_over_rotate": "<= 0.25",
    "token_over_paper": "<= 0.40",
    "rung25_over_rotate": "<= 0.12",
    "rung25_top1": ">= 0.985",
    "rung50_over_rotate": "<= 0.05",
    "rung50_top1": ">= 0.99",
    "worse_edges_in_use": "0",
    "violations_002": "<= 0.05 + 2 standard errors",
    "violations_005": "<= 0.05 + 2 standard errors",
    "aligned_002": ">= 0.7",
    "aligned_005": ">= 0.7",
}

Groups = Mapping[str, list[tuple[int, list[Outcome]]]]
"""Agent -> for every prompt the number of moved tokens and one outcome per variant."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with Engine.load(options.model, progress=True) as engine:
            report = measure(engine, options)
        report.emit(as_json=options.json)
        report.save(options.out)
    except (KVCommError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def measure(engine: Engine, options: Namespace) -> Report:
    """All figures of an engine."""
    train, test = _questions(options.data), _questions(options.test)
    num_calibrated = options.calibration if options.bound else 0
    wanted = train[: options.anchors + num_calibrated] + test[: options.tests]
    runs = team_runs(engine, options.team, wanted, options.answers)
    anchors, rest = runs[: options.anchors], runs[options.anchors :]
    for index, run in enumerate(anchors):
        note(f"anchors: question {index + 1} of {len(anchors)}")
        _learn(engine, run)
    calibrated = _outcomes(engine, rest[:num_calibrated], LADDER, "calibration")
    tested = _outcomes(engine, rest[num_calibrated:], COMPARED, "test")
    figures = _comparison(tested)
    if options.bound:
        ladder = [COMPARED.index(variant) for variant in LADDER]
        for bound in BOUNDS:
            figures += _bound_figures(calibrated, tested, ladder, bound)
    samples = {
        f"{agent} {_label(variant)}": [outcomes[index].divergence for _, outcomes in prompts]
        for agent, prompts in tested.items()
        for index, variant in enumerate(COMPARED)
    }
    return Report("fidelity", figures, settings(engine, options, test=options.test.name, answers=None), samples)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.fidelity", description="Divergence of moved KV, and the bound on it.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
    parser.add_argument("--team", default="gsm8k", help="a packaged team or a .toml file [%(default)s]")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="questions for anchors, .jsonl")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="questions to test on, .jsonl")
    parser.add_argument("--anchors", type=int, default=10, metavar="N", help="questions that teach [%(default)s]")
    parser.add_argument("--tests", type=int, default=60, metavar="N", help="questions that test [%(default)s]")
    parser.add_argument("--bound", action="store_true", help="calibrate, and hold the bound against the tests")
    parser.add_argument("--calibration", type=int, default=60, metavar="N", help="questions for that [%(default)s]")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="keep the exact runs in this file, or take them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity.json"), help="file of the run [%(default)s]")
    return parser


def _questions(file: Path) -> list[str]:
    return [str(json.loads(line)["question"]) for line in file.read_text().splitlines() if line.strip()]


def _learn(engine: Engine, run: Run) -> None:
    publish(engine, run)
    futures = [engine.learn(reading.prompt, estimators=("token", "paper")) for reading in _readers(run).values()]
    for future in futures:
        future.result()
    engine.clear_cache()


def _readers(run: Run) -> Run:
    """Every agent but the first one, who has nobody to take text from."""
    return {name: reading for name, reading in list(run.items())[1:] if reading.answer}


def _outcomes(engine: Engine, runs: Sequence[Run], variants: Sequence[Variant], what: str) -> Groups:
    found: dict[str, list[tuple[int, list[Outcome]]]] = {}
    for index, run in enumerate(runs):
        note(f"{what}: question {index + 1} of {len(runs)}")
        publish(engine, run)
        for agent, reading in _readers(run).items():
            outcomes = engine.measure(reading.prompt, reading.answer, variants).result()
            moved = sum(len(segment.token_ids) for segment in reading.prompt if segment.name is not None)
            found.setdefault(agent, []).append((moved, outcomes))
        engine.clear_cache()
    return found


def _comparison(tested: Groups) -> list[Figure]:
    """Ratios of mean divergences over all prompts, and the means of every edge group."""
    everything = [outcomes for prompts in tested.values() for _, outcomes in prompts]

    def mean(variant: Variant, among: Sequence[list[Outcome]] = everything) -> float:
        return sum(each[COMPARED.index(variant)].divergence for each in among) / len(among)

    def agreement(variant: Variant) -> float:
        return sum(each[COMPARED.index(variant)].agreement for each in everything) / len(everything)

    rotate, paper, token = COMPARED[0], COMPARED[1], LADDER[0]
    figures = [
        _figure("token_over_rotate", mean(token) / mean(rotate)),
        _figure("token_over_paper", mean(token) / mean(paper)),
        _figure("rung25_over_rotate", mean(LADDER[1]) / mean(rotate)),
        _figure("rung25_top1", agreement(LADDER[1]), "share"),
        _figure("rung50_over_rotate", mean(LADDER[2]) / mean(rotate)),
        _figure("rung50_top1", agreement(LADDER[2]), "share"),
    ]
    worse = 0
    for agent, prompts in tested.items():
        among = [outcomes for _, outcomes in prompts]
        worse += mean(token, among) > mean(rotate, among)
        figures += [_figure(f"{agent} {_label(each)}", mean(each, among), "nats") for each in COMPARED]
    figures += [_figure(f"all {_label(each)}", mean(each), "nats") for each in COMPARED]
    return [*figures, _figure("worse_edges", worse, "groups")]


def _label(variant: Variant) -> str:
    return variant.estimator if not variant.share else f"{variant.estimator} {variant.share:.0%} {variant.selector}"


class _Served(NamedTuple):
    """What a request would have got: nothing where it went exact."""

    divergence: float
    num_moved: int
    num_aligned: int


def _bound_figures(
    calibrated: Groups, tested: Groups, ladder: Sequence[int], bound: tuple[float, float]
) -> list[Figure]:
    epsilon, delta = bound
    served: list[_Served] = []
    num_requests = 0
    for agent, prompts in tested.items():
        calibration = _calibration([outcomes for _, outcomes in calibrated[agent]])
        for moved, outcomes in prompts:
            num_requests += 1
            result = _serve(calibration, moved, [outcomes[index] for index in ladder], epsilon, delta)
            if result is not None:
                served.append(result)
    name = f"{round(100 * epsilon):03d}"
    count = len(served)
    violations = sum(each.divergence > epsilon for each in served) / count if count else 0.0
    aligned = sum(each.num_aligned for each in served) / max(1, sum(each.num_moved for each in served))
    return [
        _figure(f"violations_{name}", violations, "share"),
        _figure(f"violations_{name}_limit", delta + 2 * math.sqrt(delta * (1 - delta) / max(1, count)), "share"),
        _figure(f"aligned_{name}", aligned, "share"),
        _figure(f"accepted_{name}", count / num_requests, "share"),
        _figure(f"accepted_{name}_requests", count, "requests"),
    ]


def _calibration(prompts: Sequence[Sequence[Outcome]]) -> Calibration:
    made = Calibration(len(RUNGS))
    for outcomes in prompts:
        divergences = tuple(outcome.divergence for outcome in outcomes)
        made.add(Pair(divergences, outcomes[0].distance, tuple(outcome.residual for outcome in outcomes)))
    return made


def _serve(
    calibration: Calibration, moved: int, outcomes: Sequence[Outcome], epsilon: float, delta: float
) -> _Served | None:
    """What the planner does: the chosen rung, unless the text is too far off; the next one while probes are."""
    rung = calibration.choose(epsilon, delta)
    limit = calibration.distance_limit
    if rung is None or limit is None or outcomes[0].distance > limit:
        return None
    for outcome, index in zip(outcomes[rung:], range(rung, len(outcomes)), strict=True):
        residual_limit = calibration.residual_limit(index)
        if outcome.residual is None or residual_limit is None or outcome.residual <= residual_limit:
            return _Served(outcome.divergence, moved, moved - outcome.num_recomputed)
    return None


def _figure(name: str, value: float, unit: str = "x") -> Figure:
    return Figure(name, value, unit, None, GOALS.get(name, ""))


if __name__ == "__main__":
    sys.exit(main())
