"""What the task evaluations share: command line, phases, resuming, and how a run ends.

Everything a run keeps is in its folder: `settings.json`, `samples/MODE.jsonl` with every answer, `report.json`,
`report.html`, `report.md`. The same command continues an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.figures import Figure, Report
from eval.report.contents import Contents, memory_of, write_report
from eval.tasks.analysis import ModeResult, analyse
from eval.tasks.modes import DENSE, KVCOMM, MODES, Mode, make_modes
from eval.tasks.rows import digest_of, load_rows
from eval.tasks.running import Work, measure_divergences, run_dense, run_mode, warm_up
from eval.tasks.samples import Sample, SampleFile
from eval.tasks.task import Row, Task
from eval.tasks.topology import AGENTS, TOPOLOGIES, wire
from kvcomm import Engine, KVCommError, ReusePolicy
from kvcomm.agents.team import load_team
from kvcomm.config import EngineConfig
from kvcomm.errors import InvalidRequest

ALL_ROWS = 10**9

Figures = Callable[[Mapping[str, ModeResult]], list[Figure]]


@dataclass(frozen=True)
class Evaluation:
    """One task's command.

    Attributes:
        make_task: from the path of the data; may read rows of its own.
        figures: what the task is held against, from the results by mode.
        limit: questions by default.
    """

    name: str
    make_task: Callable[[Path | None], Task]
    figures: Figures
    limit: int


def main(evaluation: Evaluation, arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print and write the report; returns the exit code."""
    options = _parser(evaluation).parse_args(arguments)
    try:
        report = _evaluate(evaluation, evaluation.make_task(options.data), options)
    except (KVCommError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues here\n")
        return 130
    report.emit(as_json=options.json)
    sys.stderr.write(f"the whole report: {options.out / 'report.html'}\n")
    return 0


def _parser(evaluation: Evaluation) -> ArgumentParser:
    name = evaluation.name
    parser = ArgumentParser(
        prog=f"python -m eval.{name}", description=f"What reuse does to a team's answers on {name}."
    )
    parser.add_argument("--model", default="smollm2-135m", help="a packaged name, folder or hub id [%(default)s]")
    parser.add_argument("--agents", type=int, default=5, choices=AGENTS, help="with the referee [%(default)s]")
    parser.add_argument("--topology", default="full", choices=TOPOLOGIES, help="who reads whom [%(default)s]")
    parser.add_argument("--modes", default="dense,exact,kvcomm,paper", help=f"some of {','.join(MODES)} [%(default)s]")
    parser.add_argument(
        "--limit", type=_positive, default=evaluation.limit, metavar="N", help="questions [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="which questions; 0: the first ones [%(default)s]")
    parser.add_argument("--data", type=Path, metavar="PATH", help="file or folder of rows [the hub]")
    parser.add_argument("--train", type=Path, metavar="FILE", help="rows for anchors and calibration [beside --data]")
    parser.add_argument("--team", help="a packaged team or a .toml file [the task's]")
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="of an answer at most [the team's]")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="answers to draw besides [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of those [%(default)s]")
    parser.add_argument("--max-divergence", type=float, default=0.02, metavar="NATS", help="of kvcomm [%(default)s]")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of kvcomm [%(default)s]")
    parser.add_argument("--anchors", type=_positive, default=16, metavar="N", help="questions that teach [%(default)s]")
    parser.add_argument("--calibration", type=_positive, default=24, metavar="N", help="and calibrate [%(default)s]")
    parser.add_argument(
        "--divergence", type=int, default=20, metavar="N", help="questions to replay for divergences [%(default)s]"
    )
    parser.add_argument("--out", type=Path, default=Path(f"out/{name}"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _evaluate(evaluation: Evaluation, task: Task, options: Namespace) -> Report:
    began_s = time.monotonic()
    modes = make_modes(options.modes, ReusePolicy(options.max_divergence, options.confidence, learn=False, audit=0.0))
    work = _work(task, options, any(mode.moves for mode in modes))
    settings = _settings(work, options)
    folder = _open_folder(options.out, settings)
    files = {mode.name: SampleFile(folder / f"{mode.name}.jsonl") for mode in modes}
    memory: dict[str, int] = {}
    with Engine.load(options.model, config=EngineConfig(contest_prompts=4)) as engine, _progress() as progress:
        dense, train = _dense(engine, work, files[DENSE], SampleFile(folder / "train.jsonl"), progress)
        others = [mode for mode in modes if mode.is_cached]
        if any(mode.moves for mode in others):
            with _bar(progress, "anchors and calibration", len(train)) as advance:
                warm_up(engine, [train[index] for index in sorted(train)], work.num_anchors, others, advance)
        for mode in others:
            with _bar(progress, mode.name, len(dense)) as advance:
                run_mode(engine, work, mode, dense, files[mode.name], advance)
        replayed = [dense[index] for index in sorted(dense)][: options.divergence]
        for mode in others:
            if mode.moves:
                with _bar(progress, f"{mode.name}: divergences", len(replayed)) as advance:
                    measure_divergences(engine, mode, replayed, files[mode.name], advance)
        memory = memory_of(engine)
        settings |= {"device": str(engine.model.device), "torch": _torch_version()}
    results = {mode.name: _analysed(mode, files, dense) for mode in modes}
    figures = [*evaluation.figures(results), Figure("minutes", (time.monotonic() - began_s) / 60, "min", goal="< 60")]
    ttft = {mode.name: list(_first_tokens(files[mode.name].read())) for mode in modes}
    contents = Contents(evaluation.name, figures, list(results.values()), settings, memory, ttft)
    write_report(contents, options.out)
    return Report(evaluation.name, figures, settings)


def _analysed(mode: Mode, files: Mapping[str, SampleFile], dense: Mapping[int, Sample]) -> ModeResult:
    epsilon = mode.policy.max_divergence if mode.name == KVCOMM else None
    return analyse(mode.name, files[mode.name].read(), dense, epsilon)


def _first_tokens(samples: Mapping[int, Sample]) -> Iterator[tuple[int, float]]:
    for sample in samples.values():
        for answer in sample.answers.values():
            yield answer.usage["prompt"], answer.usage["ttft_s"]


def _work(task: Task, options: Namespace, moves: bool) -> Work:
    team = wire(load_team(options.team or task.team), options.agents, options.topology)
    if options.max_new_tokens is not None:
        from kvcomm.agents.warming import limited

        team = limited(team, options.max_new_tokens)
    num_train = options.anchors + EngineConfig(contest_prompts=4).contest_prompts + options.calibration if moves else 0
    every = task.arrange(load_rows(task.source, task.source.test, options.data, ALL_ROWS))
    rows = _chosen(every, options.limit, options.seed)
    train: list[Row] = []
    if num_train and task.source.train == task.source.test and options.train is None:
        asked = {digest_of([row]) for row in rows}
        train = [row for row in every if digest_of([row]) not in asked][:num_train]
    elif num_train:
        if options.data is not None and options.data.is_file() and options.train is None:
            raise InvalidRequest(f"{options.data} is one file; give --train for rows to learn from, or a folder")
        train = task.arrange(load_rows(task.source, task.source.train, options.train or options.data, ALL_ROWS))
    if len(train) < num_train:
        raise InvalidRequest(f"{len(train)} rows to learn from are too few; {num_train} are needed: give --train")
    return Work(task, team, rows, train[:num_train], options.anchors, options.samples, options.temperature)


def _chosen(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """The first rows, or for another seed than 0 a random choice."""
    import random

    return list(rows[:limit]) if not seed else random.Random(seed).sample(list(rows), min(limit, len(rows)))


def _dense(
    engine: Engine, work: Work, file: SampleFile, train_file: SampleFile, progress: Progress
) -> tuple[dict[int, Sample], dict[int, Sample]]:
    """The dense runs of the questions, and of those to learn from."""
    found = []
    with Engine(engine.model, engine.tokenizer, config=EngineConfig(cache=False)) as cold:
        for title, rows, samples in ((DENSE, work.rows, file), (f"{DENSE}: to learn from", work.train, train_file)):
            with _bar(progress, title, len(rows)) as advance:
                run_dense(cold, work, rows, samples, advance)
            found.append({index: sample for index, sample in samples.read().items() if index < len(rows)})
    return found[0], found[1]


def _settings(work: Work, options: Namespace) -> dict[str, Any]:
    given = {
        name: value for name, value in vars(options).items() if name not in {"json", "out", "data", "train", "modes"}
    }
    agents = [[agent.name, agent.system, agent.prompt] for agent in work.team.agents]
    return {
        **given,
        "data": None if options.data is None else options.data.name,
        "rows": digest_of(work.rows),
        "train_rows": digest_of(work.train),
        "templates": hashlib.sha256(json.dumps(agents).encode()).hexdigest(),
        "reads": {agent.name: [slot.name for slot in agent.slots] for agent in work.team.agents},
    }


def _open_folder(out: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the samples; refuses one of another run.

    Raises:
        InvalidRequest: the folder holds samples of other settings; names the first difference.
    """
    file, samples = out / "settings.json", out / "samples"
    if file.exists():
        before = json.loads(file.read_text())
        for name in settings.keys() - {"divergence"}:
            if before.get(name) != settings[name]:
                raise InvalidRequest(
                    f"{out} holds a run with {name} {before.get(name)!r}, not {settings[name]!r}; give another --out"
                )
    samples.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return samples


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))


@contextmanager
def _bar(progress: Progress, title: str, total: int) -> Iterator[Callable[[int], None]]:
    bar = progress.add_task(title, total=total)
    yield lambda count: progress.advance(bar, count)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value
