"""How far answers on moved KV are from exact ones, and whether the bound holds.

    python -m eval.fidelity --data ANCHORS.jsonl --test TEST.jsonl [--bound] [--shift [FILE ...]] [--answers FILE]

A team of agents answers every question exactly. Anchors are learned from the first questions of the one file; on
questions of the other file every reader's prompt is replayed at many rungs, its text moved from what ran before it, and
the divergence from the exact answer is taken: mean KL in nats over the next 32 tokens, teacher-forced. With --bound
further questions of the one file are replayed, too: they calibrate each reader, so many pairs each, and choose the best
plan, and both are held against the tests. With --shift the team reads other texts on these banks. With --heal it is
measured instead what is left of the divergence where moved KV is replaced by exact KV while answers are decoded.

What was measured is kept beside --out, or in --keep, line by line: an interrupted run goes on there, and a run with
more questions adds to it.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from eval.bound import BOUNDS, bound_figures
from eval.command import add_model, add_outputs, note
from eval.data_files import rows_of
from eval.figures import Figure, Report
from eval.healed import HealedFile, heal_figures, heal_samples, teach_anchors
from eval.plans import alike, best_plan, judge
from eval.replayed import ByAgent, OutcomeFile, Replayed
from eval.shift import shift_figures, shift_texts
from eval.team_answers import Run, in_order, team_runs
from eval.workload import settings
from kvcomm import Engine, KVCommError, ReusePolicy, Rung
from kvcomm.lab.bounds import Calibration, add_pair
from kvcomm.lab.methods import add_to
from kvcomm.lab.moving import CORRECTED, TURNED

SHARES = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0)
PLANNED = tuple(Rung(estimator, share) for estimator in ("token", "rotate") for share in SHARES)
"""Rungs that plans are made of."""
TOKEN, RUNG25, RUNG50 = Rung("token"), Rung("token", 0.25), Rung("token", 0.5)
ROTATE, PAPER = Rung("rotate"), Rung("paper")
CACHEBLEND = (Rung("rotate", 0.15, "deviation"), Rung("rotate", 0.25, "deviation"))
SELECTORS = (
    Rung("rotate", 0.5, "deviation"),
    Rung("token", 0.25, "influence"),
    Rung("token", 0.5, "influence"),
    Rung("token", 0.25, "head"),
)
"""Other ways to choose the tokens of a rung, on request."""
ESSENTIAL = tuple(dict.fromkeys((*CORRECTED, *TURNED, *PLANNED, PAPER, *CACHEBLEND)))
OWN = frozenset(rung for rung in ESSENTIAL if rung != PAPER)
"""Rungs that a prompt must have been measured at."""
BEST = 0.25
"""Share of the moved tokens that the best plan may compute."""
LOOKING = ReusePolicy(max_divergence=1.0, rungs=(ROTATE,))
"""By which a prompt shows what its answer reads, from which the weights of heads are learned."""
GOALS = {
    "token_over_rotate": "<= 0.25",
    "token_over_paper": "<= 0.40",
    "rung25_over_rotate": "<= 0.12",
    "rung25_top1": ">= 0.985",
    "rung50_over_rotate": "<= 0.05",
    "rung50_top1": ">= 0.99",
    "worse_readers": "0",
    "best25_over_rotate": "<= 0.06",
}
SHIFTED = ("humaneval/humaneval_public.jsonl.gz", "rag/documents_public.jsonl.gz")
"""Files of other texts, beside the folder of the questions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with Engine.load(options.model, prior=None, progress=True) as engine:
            add_to(engine)
            report = (measure_healing if options.heal else measure)(engine, options)
        report.emit(as_json=options.json)
        report.save(options.out)
    except (KVCommError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues here\n")
        return 130
    return 0


def measure(engine: Engine, options: Namespace) -> Report:
    """All figures of an engine that knows the methods of `kvcomm.lab.methods` and has no prior.

    Raises:
        InvalidRequest: a file that cannot be used.
    """
    train, test = _questions(options.data), _questions(options.test)
    shifted = None if options.shift is None else shift_texts(_shift_files(options), options.shift_texts)
    num_calibrated = options.calibration if options.bound or shifted is not None else 0
    wanted = [*train[: options.anchors + num_calibrated], *test[: options.tests]]
    runs = team_runs(engine, options.team, wanted, options.answers)
    teaching, rest = runs[: options.anchors], runs[options.anchors :]
    calibrating, testing = rest[:num_calibrated], rest[num_calibrated:]
    compared = ESSENTIAL + (SELECTORS if options.selectors else ())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    outcomes = OutcomeFile(options.keep or options.out.with_suffix(".outcomes.jsonl"), engine, compared, teaching)
    if shifted is not None or not outcomes.is_whole(rest):
        _teach(engine, teaching)
    calibrated, _ = _usable(outcomes.measure(calibrating, "calibration"))
    tested, num_left_out = _usable(outcomes.measure(testing, "test"))
    figures = [*_comparison(tested, compared), _figure("left_out", num_left_out, "prompts")]
    if calibrated:
        figures += _best_plan(calibrated, tested)
    if options.bound:
        for bound in BOUNDS:
            for ladder, prefix in ((CORRECTED, ""), (TURNED, "turned_")):
                calibrations = {
                    agent: Calibration(ladder, [each.pair for each in calibrated.get(agent, ())]) for agent in tested
                }
                along = {agent: [each.along(ladder) for each in prompts] for agent, prompts in tested.items()}
                figures += bound_figures(along, calibrations, bound, prefix)
    if shifted is not None:
        _calibrate(engine, calibrated)
        figures += shift_figures(engine, options.team, shifted)
    samples = {
        f"{agent} {rung}": [prompt.outcomes[rung].divergence for prompt in prompts if rung in prompt.outcomes]
        for agent, prompts in tested.items()
        for rung in compared
    }
    config = settings(engine, options, test=options.test.name, answers=None, keep=None, shift=shifted is not None)
    return Report("fidelity", figures, config, samples)


def measure_healing(engine: Engine, options: Namespace) -> Report:
    """Figures of healing, of an engine that has no prior.

    Raises:
        InvalidRequest: a file that cannot be used.
    """
    train, test = _questions(options.data), _questions(options.test)
    runs = team_runs(engine, options.team, [*train[: options.anchors], *test[: options.tests]], options.answers)
    teaching, testing = runs[: options.anchors], runs[options.anchors :]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    file = HealedFile(options.keep or options.out.with_suffix(".healed.jsonl"), engine, teaching)
    if not file.is_whole(testing):
        teach_anchors(engine, teaching)
    measured = file.measure(testing)
    config = settings(engine, options, test=options.test.name, answers=None, keep=None)
    return Report("fidelity", heal_figures(measured), config, heal_samples(measured))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.fidelity", description="Divergence of moved KV, and the bound on it.")
    add_model(parser)
    parser.add_argument("--team", default="gsm8k", help="a packaged team or a .toml file [%(default)s]")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="questions for anchors, .jsonl")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="questions to test on, .jsonl")
    parser.add_argument("--anchors", type=int, default=24, metavar="N", help="questions that teach [%(default)s]")
    parser.add_argument("--tests", type=int, default=60, metavar="N", help="questions that test [%(default)s]")
    parser.add_argument("--bound", action="store_true", help="calibrate, and hold the bound against the tests")
    parser.add_argument("--calibration", type=int, default=60, metavar="N", help="questions for that [%(default)s]")
    parser.add_argument(
        "--shift", type=Path, nargs="*", metavar="FILE", help="read other texts too [HumanEval and documents]"
    )
    parser.add_argument("--shift-texts", type=int, default=10, metavar="N", help="of each such file [%(default)s]")
    parser.add_argument("--heal", action="store_true", help="measure healing, and nothing else")
    parser.add_argument("--selectors", action="store_true", help="compare other ways to choose what is recomputed")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="keep the exact runs in this file, or take them")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep what was measured in this file [beside --out]")
    add_outputs(parser, "fidelity")
    return parser


def _questions(file: Path) -> list[str]:
    return rows_of(file, lambda row: str(row["question"]), 'an object with the text "question"')


def _teach(engine: Engine, runs: Sequence[Run]) -> None:
    """Learn anchors, and by which heads a rung is to choose."""
    for index, run in enumerate(runs):
        note(f"anchors: question {index + 1} of {len(runs)}")
        for _, reading in in_order(engine, run):
            engine.reuse.calibrate(reading.prompt, reading.answer, LOOKING).result()
            engine.reuse.learn(reading.prompt, estimators=("token", "paper")).result()


def _calibrate(engine: Engine, calibrated: ByAgent) -> None:
    """Give an engine's readers the pairs that were measured."""
    for prompts in calibrated.values():
        for each in prompts:
            add_pair(engine, each.reader, each.pair)


def _usable(measured: ByAgent) -> tuple[dict[str, list[Replayed]], int]:
    """Prompts at which our own rungs could be measured, and how many could not; the others may lack what they like."""
    found = {agent: [each for each in prompts if each.outcomes.keys() >= OWN] for agent, prompts in measured.items()}
    num_left_out = sum(map(len, measured.values())) - sum(map(len, found.values()))
    return {agent: prompts for agent, prompts in found.items() if prompts}, num_left_out


def _comparison(tested: ByAgent, compared: Sequence[Rung]) -> list[Figure]:
    """Ratios of mean divergences over all prompts, and the means of every reader.

    Raises ValueError where nothing could be measured.
    """
    everything = [prompt for prompts in tested.values() for prompt in prompts]
    if not everything:
        raise ValueError("no prompt of the tests could be measured; give more --tests, or more --anchors")

    def ratio(rung: Rung, other: Rung) -> float:
        """Over prompts that have both; 0 where there are none."""
        both = [each.outcomes for each in everything if {rung, other} <= each.outcomes.keys()]
        total = sum(each[other].divergence for each in both)
        return sum(each[rung].divergence for each in both) / total if total else 0.0

    def mean(rung: Rung, agent: str) -> float:
        values = [each.outcomes[rung].divergence for each in tested[agent] if rung in each.outcomes]
        return sum(values) / len(values) if values else math.nan

    def agreement(rung: Rung) -> float:
        return sum(each.outcomes[rung].agreement for each in everything) / len(everything)

    figures = [
        _figure("token_over_rotate", ratio(TOKEN, ROTATE)),
        _figure("token_over_paper", ratio(TOKEN, PAPER)),
        _figure("rung25_over_rotate", ratio(RUNG25, ROTATE)),
        _figure("rung25_top1", agreement(RUNG25), "share"),
        _figure("rung50_over_rotate", ratio(RUNG50, ROTATE)),
        _figure("rung50_top1", agreement(RUNG50), "share"),
        _figure("worse_readers", sum(mean(TOKEN, agent) > mean(ROTATE, agent) for agent in tested), "readers"),
        *(_figure(f"cacheblend{each.share * 100:.0f}_over_rotate", ratio(each, ROTATE)) for each in CACHEBLEND),
        _figure("prompts", len(everything), "prompts"),
    ]
    figures += [_figure(f"all {each} over rotate", ratio(each, ROTATE)) for each in compared]
    means = {f"{agent} {each}": mean(each, agent) for agent in tested for each in compared}
    return figures + [_figure(name, value, "nats") for name, value in means.items() if not math.isnan(value)]


def _best_plan(calibrated: ByAgent, tested: ByAgent) -> list[Figure]:
    """The best plan on the calibration questions, of one rung for each reader and of one for all, as the tests see it.

    Raises ValueError for a reader that was tested and not calibrated.
    """
    if unknown := tested.keys() - calibrated.keys():
        raise ValueError(f"nothing calibrates agent {min(unknown)!r}; give more --calibration")
    rotate, _ = judge(tested, alike(tested, ROTATE))
    plan = best_plan(calibrated, PLANNED, BEST)
    one = min(
        (each for each in PLANNED if each.share <= BEST),
        key=lambda rung: judge(calibrated, alike(calibrated, rung))[0],
    )
    divergence, computed = judge(tested, plan)
    for agent, rung in plan.items():
        note(f"best plan: agent {agent} at {rung}")
    return [
        _figure("best25_over_rotate", divergence / rotate),
        _figure("best25_nats", divergence, "nats"),
        _figure("rotate_nats", rotate, "nats"),
        _figure("best25_computed", computed, "share"),
        _figure("best25_alike_over_rotate", judge(tested, alike(tested, one))[0] / rotate),
        *(_figure(f"best25 {agent}: {rung}", rung.share, "share") for agent, rung in plan.items()),
    ]


def _shift_files(options: Namespace) -> list[Path]:
    return options.shift or [options.data.parent.parent / name for name in SHIFTED]


def _figure(name: str, value: float, unit: str = "x") -> Figure:
    return Figure(name, value, unit, None, GOALS.get(name, ""))


if __name__ == "__main__":
    sys.exit(main())
