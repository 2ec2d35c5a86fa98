"""How far answers on moved KV are from exact ones, and whether the bound holds.

    python -m eval.fidelity --data ANCHORS.jsonl --test TEST.jsonl [--bound] [--shift [FILE ...]] [--answers FILE]

A team of agents answers every question exactly. Anchors are learned from the first questions of the one file, and the
next ones decide how strongly to correct; on questions of the other file every prompt is replayed with its moved
segments in several ways, and the divergence from the exact answer is taken: mean KL in nats over the next 32 tokens,
teacher-forced. An edge group is one agent's prompt. With --bound further questions calibrate each group, and what would
be accepted for two bounds is held against them; with --shift the team reads other texts on these banks.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.bound import BOUNDS, Rungs, bound_figures
from eval.data_files import rows_of
from eval.figures import Figure, Report
from eval.shift import shift_figures, shift_texts
from eval.team_answers import Run, team_runs
from eval.workload import note, settings
from kvcomm import Engine, KVCommError, ReusePolicy
from kvcomm.agents.example_runs import publish
from kvcomm.align.groups import EdgeGroup
from kvcomm.lab.variant import Variant
from kvcomm.memory.segments import Segment

POLICY = ReusePolicy(max_divergence=BOUNDS[0][0], confidence=1 - BOUNDS[0][1])
"""Says how groups are calibrated; the bounds themselves are applied afterwards."""
LADDER = tuple(Variant("token", share) for share in POLICY.rungs)
"""Corrected as strongly as the contest of the group says."""
TOKEN, RUNG25, RUNG50 = LADDER[0], Variant("token", 0.25), Variant("token", 0.5)
ROTATE, PAPER = Variant("rotate"), Variant("paper")
OTHERS = (ROTATE, PAPER, Variant("rotate", 0.15, "deviation"), Variant("rotate", 0.5, "deviation"))
SELECTORS = (Variant("token", 0.25, "influence"), Variant("token", 0.5, "influence"), Variant("token", 0.25, "head"))
"""Other ways to choose the tokens of a rung, on request."""
COMPARED = tuple(dict.fromkeys((*LADDER, RUNG25, RUNG50, *OTHERS, *SELECTORS)))
ESSENTIAL = COMPARED[: -len(SELECTORS)]
GOALS = {
    "token_over_rotate": "<= 0.25",
    "token_over_paper": "<= 0.40",
    "rung25_over_rotate": "<= 0.12",
    "rung25_top1": ">= 0.985",
    "rung50_over_rotate": "<= 0.05",
    "rung50_top1": ">= 0.99",
    "worse_edges_in_use": "0",
}
SHIFTED = ("humaneval/humaneval_public.jsonl.gz", "rag/documents_public.jsonl.gz")
"""Files of other texts, beside the folder of the questions."""

Tested = Mapping[str, Sequence[Rungs]]
"""Agent -> for every prompt one outcome per variant in `COMPARED`."""


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
    shifted = None if options.shift is None else shift_texts(_shift_files(options), options.shift_texts)
    num_calibrated = engine.config.contest_prompts + (
        options.calibration if options.bound or shifted is not None else 0
    )
    wanted = [*train[: options.anchors + num_calibrated], *test[: options.tests]]
    runs = team_runs(engine, options.team, wanted, options.answers)
    anchors, rest = runs[: options.anchors], runs[options.anchors :]
    for index, run in enumerate(anchors):
        note(f"anchors: question {index + 1} of {len(anchors)}")
        _learn(engine, run)
    groups = _calibrate(engine, rest[:num_calibrated])
    compared = COMPARED if options.selectors else ESSENTIAL
    tested = _measure(engine, rest[num_calibrated:], groups, compared)
    figures = _comparison(tested, groups, compared)
    if options.bound:
        calibrations = {agent: group.calibration for agent, group in groups.items()}
        ladder = {agent: [_ladder(prompt) for prompt in prompts] for agent, prompts in tested.items()}
        for bound in BOUNDS:
            figures += bound_figures(ladder, calibrations, bound)
    if shifted is not None:
        figures += shift_figures(engine, options.team, shifted)
    samples = {
        f"{agent} {_label(variant)}": [prompt.outcomes[index].divergence for prompt in prompts]
        for agent, prompts in tested.items()
        for index, variant in enumerate(compared)
    }
    config = settings(engine, options, test=options.test.name, answers=None, shift=shifted is not None)
    return Report("fidelity", figures, config, samples)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.fidelity", description="Divergence of moved KV, and the bound on it.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
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
    parser.add_argument("--selectors", action="store_true", help="compare other ways to choose what is recomputed")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="keep the exact runs in this file, or take them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity.json"), help="file of the run [%(default)s]")
    return parser


def _questions(file: Path) -> list[str]:
    return rows_of(file, lambda row: str(row["question"]), 'an object with the text "question"')


def _learn(engine: Engine, run: Run) -> None:
    publish(engine, _pairs(run))
    futures = [engine.learn(reading.prompt, estimators=("token", "paper")) for reading in _readers(run).values()]
    for future in futures:
        future.result()
    engine.clear_cache()


def _pairs(run: Run) -> list[tuple[tuple[Segment, ...], tuple[int, ...]]]:
    return [(reading.prompt, reading.answer) for reading in run.values()]


def _readers(run: Run) -> Run:
    """Every agent but the first one, who has nobody to take text from."""
    return {name: reading for name, reading in list(run.items())[1:] if reading.answer}


def _calibrate(engine: Engine, runs: Sequence[Run]) -> dict[str, EdgeGroup]:
    """Let every prompt take part in what its group is at; returns the groups."""
    groups: dict[str, EdgeGroup] = {}
    for index, run in enumerate(runs):
        note(f"calibration: question {index + 1} of {len(runs)}")
        publish(engine, _pairs(run))
        for agent, reading in _readers(run).items():
            group = engine.calibrate(reading.prompt, reading.answer, POLICY).result()
            if group is None or groups.setdefault(agent, group) is not group:
                note(f"question {index + 1}: other segments than usual can be moved for agent {agent}; left out")
        engine.clear_cache()
    return groups


def _measure(
    engine: Engine, runs: Sequence[Run], groups: Mapping[str, EdgeGroup], compared: Sequence[Variant]
) -> Tested:
    found: dict[str, list[Rungs]] = {}
    for index, run in enumerate(runs):
        note(f"test: question {index + 1} of {len(runs)}")
        publish(engine, _pairs(run))
        for agent, reading in _readers(run).items():
            variants = [replace(each, strength=_strength(each, groups[agent])) for each in compared]
            outcomes = engine.measure(reading.prompt, reading.answer, variants).result()
            moved = sum(len(segment.token_ids) for segment in reading.prompt if segment.name is not None)
            found.setdefault(agent, []).append(Rungs(moved, outcomes))
        engine.clear_cache()
    return found


def _strength(variant: Variant, group: EdgeGroup) -> float:
    return group.strength if variant.estimator == "token" else 1.0


def _ladder(prompt: Rungs) -> Rungs:
    return prompt._replace(outcomes=prompt.outcomes[: len(LADDER)])


def _comparison(tested: Tested, groups: Mapping[str, EdgeGroup], compared: Sequence[Variant]) -> list[Figure]:
    """Ratios of mean divergences over all prompts, and the means of every edge group."""
    everything = [prompt for prompts in tested.values() for prompt in prompts]

    def mean(variant: Variant, among: Sequence[Rungs] = everything) -> float:
        return sum(each.outcomes[COMPARED.index(variant)].divergence for each in among) / len(among)

    def agreement(variant: Variant) -> float:
        return sum(each.outcomes[COMPARED.index(variant)].agreement for each in everything) / len(everything)

    rotate = mean(ROTATE)
    worse = sum(
        groups[agent].strength > 0 and mean(TOKEN, prompts) > mean(ROTATE, prompts) for agent, prompts in tested.items()
    )
    figures = [
        _figure("token_over_rotate", mean(TOKEN) / rotate),
        _figure("token_over_paper", mean(TOKEN) / mean(PAPER)),
        _figure("rung25_over_rotate", mean(RUNG25) / rotate),
        _figure("rung25_top1", agreement(RUNG25), "share"),
        _figure("rung50_over_rotate", mean(RUNG50) / rotate),
        _figure("rung50_top1", agreement(RUNG50), "share"),
        _figure("worse_edges_in_use", worse, "groups"),
    ]
    figures += [
        _figure(f"all {_label(each)} over rotate", mean(each) / rotate) for each in compared[compared.index(PAPER) :]
    ]
    for agent, prompts in tested.items():
        figures.append(_figure(f"{agent} strength", groups[agent].strength))
        figures += [_figure(f"{agent} {_label(each)}", mean(each, prompts), "nats") for each in compared]
    return figures


def _label(variant: Variant) -> str:
    return variant.estimator if not variant.share else f"{variant.estimator} {variant.share:.0%} {variant.selector}"


def _shift_files(options: Namespace) -> list[Path]:
    return options.shift or [options.data.parent.parent / name for name in SHIFTED]


def _figure(name: str, value: float, unit: str = "x") -> Figure:
    return Figure(name, value, unit, None, GOALS.get(name, ""))


if __name__ == "__main__":
    sys.exit(main())
