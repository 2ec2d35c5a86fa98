"""What the task evaluations share: command line, phases, resuming, and how a run ends.

Everything a run keeps is in its folder: `settings.json`, `samples/MODE.jsonl` with every answer, `times.jsonl`,
`divergences.jsonl`, `anchors/`, and at the end `report.json`, `report.html`, `report.md`. The same command continues an
interrupted run; with further modes it adds them.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eval.ending import ended_in_order
from eval.figures import Figure, Report
from eval.report.contents import Contents, bound_figures
from eval.report.facts import facts_of
from eval.report.writing import write_report
from eval.tasks.analysis import ModeResult
from eval.tasks.modes import make_modes
from eval.tasks.options import COLD_CONFIG, CONFIG, make_parser, make_work, settings_of
from eval.tasks.phases import Run
from eval.tasks.program import note_isolation
from eval.tasks.progress import Phases
from eval.tasks.run_folder import RunFolder
from eval.tasks.task import Task
from kvcomm import Engine, KVCommError, ReusePolicy
from kvcomm.lab.methods import add_to

Figures = Callable[[Mapping[str, ModeResult]], list[Figure]]


@dataclass(frozen=True)
class Evaluation:
    """One task's command.

    Attributes:
        make_task: from the options; may read rows of its own.
        figures: what the task is held against, from the results by mode.
        limit: questions by default.
        num_samples: answers drawn by default, besides the greedy one.
        add_options: options of the task's own.
        max_computed: share of the prompt tokens that kvcomm is to compute at most, at the default bound.
    """

    name: str
    make_task: Callable[[Namespace], Task]
    figures: Figures
    limit: int
    num_samples: int = 0
    add_options: Callable[[ArgumentParser], None] = lambda parser: None
    max_computed: float | None = None


def main(evaluation: Evaluation, arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print and write the report; returns the exit code."""
    parser = make_parser(evaluation.name, evaluation.limit, evaluation.num_samples)
    evaluation.add_options(parser)
    options = parser.parse_args(arguments)
    try:
        with ended_in_order():
            report = _evaluate(evaluation, options)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues here\n")
        return 130
    report.emit(as_json=options.json)
    sys.stderr.write(f"the whole report: {options.out / 'report.html'}\n")
    return 0


def _evaluate(evaluation: Evaluation, options: Namespace) -> Report:
    began_s = time.monotonic()
    task = evaluation.make_task(options)
    modes = make_modes(options.modes, ReusePolicy(options.max_divergence, options.confidence, learn=False, audit=0.0))
    work = make_work(task, options, learns=any(mode.moves for mode in modes))
    way = task.isolation([agent.name for agent in work.team.agents])
    if way is not None:
        note_isolation(way)
    settings = settings_of(work, options)
    folder = RunFolder.open(options.out, settings)
    try:
        with Engine.load(options.model, config=CONFIG, prior=None) as engine, Phases() as phases:
            add_to(engine)
            with Engine(engine.model, engine.tokenizer, config=COLD_CONFIG) as cold:
                run = Run(engine, cold, work, modes, folder, phases)
                run.compute(num_timed=options.timed, num_replayed=options.divergence)
            facts = facts_of(engine, work, modes, options) | {
                "programs_kept_apart_by": None if way is None else str(way)
            }
    finally:
        minutes = folder.add_minutes((time.monotonic() - began_s) / 60)
    results = run.results()
    figures = [
        *evaluation.figures(results),
        *bound_figures(results, evaluation.max_computed),
        Figure("minutes", minutes, "min", goal="< 60"),
    ]
    contents = Contents(task, figures, list(results.values()), settings, facts, folder.times.read())
    write_report(contents, options.out)
    return Report(evaluation.name, figures, settings)
