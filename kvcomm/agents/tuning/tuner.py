"""`kvcomm tune`: exact runs, banks, search, calibration, verification, one after the other within a budget.

Everything that takes long is kept in the folder beside the profile, so that a run that was interrupted goes on where it
was. The search stops when its time is over; calibration and verification are never cut short.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from kvcomm.agents.example_runs import BATCH, Note
from kvcomm.agents.team import Team
from kvcomm.agents.tuning import search
from kvcomm.agents.tuning.answers import TeamRun, exact_runs, greedy, team_digest
from kvcomm.agents.tuning.checking import calibrations, judge
from kvcomm.agents.tuning.costing import measure_costs
from kvcomm.agents.tuning.plan import SAMPLE, Costs, KeptCosts, TuningPlan, make_plan
from kvcomm.agents.tuning.profile import (
    BANKS,
    AgentTable,
    BoundTable,
    DataTable,
    ModelTable,
    PointTable,
    SettingsTable,
    TeamTable,
    TuningProfile,
    ValidityTable,
    VerificationTable,
    bank_digests,
    state_folder,
    write_pairs,
    write_profile,
)
from kvcomm.agents.tuning.replays import (
    EngineMaker,
    MeasuredPrompts,
    Replays,
    banks_of,
    calibrate,
    give_banks,
    learn,
    measure,
)
from kvcomm.agents.tuning.rows import RULE, Row, Split, split_rows
from kvcomm.agents.tuning.state import append_line, claim, damaged, read_kept
from kvcomm.align.bank import BankSnapshot
from kvcomm.align.bound import Bound
from kvcomm.align.ladder import Rung
from kvcomm.align.profile_file import READERS_FILE
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy

HOLDS_FOR = "this model, this team, and inputs of the kind that the rows are of; not for other texts"


@dataclass(frozen=True)
class TuningTask:
    """What is tuned.

    Attributes:
        model, team_name, data_name: as they were given, for people.
        rows: every row there is, in order of the split.
        budget_s: wall-clock seconds of a run and of the sample behind its plan, even if that was taken before.
        out: the profile's file.
    """

    make_engine: EngineMaker
    model: str
    team: Team
    team_name: str
    rows: Sequence[Row]
    data_name: str
    policy: ReusePolicy
    budget_s: float
    out: str | Path
    note: Note = field(default=lambda text: None)

    def __post_init__(self) -> None:
        if self.policy.is_exact:
            raise InvalidRequest("--max-divergence must be above 0: exact reuse needs no tuning")
        if not self.budget_s > 0:
            raise InvalidRequest(f"--budget must be above 0 seconds, not {self.budget_s:g}")

    @property
    def folder(self) -> Path:
        """Where banks and state are kept."""
        return state_folder(Path(self.out))

    @property
    def bound(self) -> Bound:
        """What is asked for."""
        return Bound(self.policy.max_divergence, self.policy.delta)


@dataclass
class Chosen:
    """What the search has arrived at."""

    config: EngineConfig
    banks: list[BankSnapshot]
    measured: MeasuredPrompts
    points: list[search.Point] = field(default_factory=list)


def plan_tuning(task: TuningTask) -> TuningPlan:
    """Measure the cost of a row on a small sample and plan the budget, or take the plan of an interrupted run.

    Raises:
        InvalidRequest: too few rows, too small a budget, or the folder is of another run; with the numbers.
    """
    file = task.folder / "costs.json"
    with task.make_engine(EngineConfig()) as engine:
        claim(task.folder, _identity(task, engine))
        if not read_kept(file, KeptCosts):
            sample = list(task.rows[:BATCH])
            if len(sample) < SAMPLE:
                raise InvalidRequest(
                    f"{len(task.rows)} rows are too few: the sample that costs are measured by has {SAMPLE}"
                )
            costs = measure_costs(engine, greedy(task.team), sample, task.folder / "answers.jsonl", task.note)
            append_line(file, costs._asdict())
    kept = read_kept(file, KeptCosts)
    if not kept:
        raise damaged(file, "nothing is left in it")
    costs = Costs(**kept[-1].model_dump())
    return make_plan(costs, len(task.rows), task.budget_s, task.policy.delta, len(task.team.agents) - 1)


def tune(task: TuningTask, plan: TuningPlan) -> TuningProfile:
    """Do what the plan says and write the profile, its pairs and its banks.

    Raises:
        InvalidRequest: nothing of the team's prompts can be moved.
        AnchorFileError: something cannot be written.
    """
    started = time.monotonic()
    split = split_rows(task.rows, plan.sizes)
    team = greedy(task.team)
    config = EngineConfig()
    with task.make_engine(config) as engine:
        namespace = engine.namespace()
        num_groups = engine.reuse.parts.anchors.shape.num_groups
        wanted = [row for part in split for row in part]
        runs = exact_runs(engine, team, wanted, task.folder / "answers.jsonl", task.note)
    data = _by_part(split, runs)
    deadline = started + task.budget_s - plan.sample_s - 1.1 * (plan.calibrate_s + plan.verify_s)
    chosen = _search(task, config, num_groups, data, plan, deadline)
    policy = ReusePolicy(
        max_divergence=task.policy.max_divergence,
        confidence=task.policy.confidence,
        basis=task.policy.basis,
        rungs=search.choose_rungs(chosen.measured, search.BASE, task.bound),
    )
    out = Path(task.out)
    with task.make_engine(chosen.config) as engine:
        readers = _calibrate(task, engine, chosen, data[2], policy)
        found = _verify(task, engine, data[3], readers, policy)
        pairs = write_pairs(out, namespace, engine.reuse.parts.book.knowledge(namespace))
        agents = {agent: _agent(engine, reader) for agent, reader in readers.items()}
    profile = TuningProfile(
        format=2,
        model=ModelTable(name=task.model, namespace=namespace),
        team=TeamTable(name=task.team_name, digest=team_digest(team)),
        bound=_bound(policy),
        settings=_settings(chosen.config),
        ladders={ladder[0].estimator: tuple(rung.share for rung in ladder) for ladder in policy.ladders},
        verification=found,
        agents=agents,
        validity=_validity(task),
        data=_data(task, split),
        pairs=pairs,
        banks=bank_digests(task.folder / BANKS),
        pareto=tuple(PointTable(**point._asdict()) for point in search.mark_front(chosen.points)),
    )
    write_profile(profile, out)
    return profile


def _identity(task: TuningTask, engine: Engine) -> dict[str, str]:
    return {
        "model": engine.namespace(),
        "team": team_digest(greedy(task.team)),
        "data": hashlib.sha256(" ".join(row.digest for row in task.rows).encode()).hexdigest(),
        "bound": f"{task.policy.max_divergence!r} {task.policy.confidence!r} {task.policy.basis}",
    }


def _by_part(split: Split, runs: Sequence[TeamRun]) -> list[Replays]:
    parts, first = [], 0
    for rows in split:
        parts.append(Replays(rows, runs[first : first + len(rows)]))
        first += len(rows)
    return parts


def _search(
    task: TuningTask, config: EngineConfig, num_groups: int, data: list[Replays], plan: TuningPlan, deadline: float
) -> Chosen:
    """Everything at the default settings, then setting by setting as long as there is time."""
    banks = _banks(task, config, data[0])
    measured = _trial(task, config, banks, data, search.BASE, "as it is")
    if not measured:
        raise InvalidRequest(
            f"nothing of the prompts of team {task.team.name!r} can be moved; there is nothing to tune"
        )
    chosen = Chosen(config, banks, measured, search.pareto(measured, search.BASE))
    changed = _improve(task, chosen, data, plan, num_groups, deadline)
    if changed:
        chosen.measured = _trial(task, chosen.config, chosen.banks, data, search.BASE, changed)
        chosen.points += search.pareto(chosen.measured, search.BASE, changed)
    return chosen


def _improve(
    task: TuningTask, chosen: Chosen, data: list[Replays], plan: TuningPlan, num_groups: int, deadline: float
) -> str:
    """Try setting by setting, keep what gains, until the time is over; returns the labels of what was kept."""
    best = search.score(chosen.measured, search.PROBED)
    price_s = plan.base_s / 3
    changed = ""
    for axis in range(search.num_axes(num_groups)):
        for each in search.candidates(chosen.config, axis, num_groups):
            # What was chosen has to be measured again at every share before a ladder can be.
            if time.monotonic() + price_s + each.needs_banks * plan.learn_s + plan.base_s > deadline:
                task.note("search: its time is over")
                return changed
            begun = time.monotonic()
            given = _banks(task, each.config, data[0]) if each.needs_banks else chosen.banks
            found = _trial(task, each.config, given, data, search.PROBED, each.label)
            price_s = max(price_s, time.monotonic() - begun - each.needs_banks * plan.learn_s)
            chosen.points += search.pareto(found, search.PROBED, each.label)
            value = search.score(found, search.PROBED)
            if found and value < (1 - search.MIN_GAIN) * best:
                best, changed = value, f"{changed} {each.label}".strip()
                chosen.config, chosen.banks = each.config, given
    return changed


def _banks(task: TuningTask, config: EngineConfig, data: Replays) -> list[BankSnapshot]:
    """What the anchor rows teach under these sketches, from the folder where it is there."""
    config = EngineConfig(sketch_groups=config.sketch_groups, sketch_layers=config.sketch_layers)
    folder = task.folder / f"learned-{config.sketch_groups}-{config.sketch_layers}-{len(data.rows)}"
    with task.make_engine(config) as engine:
        if (folder / READERS_FILE).exists():  # written last
            engine.reuse.load(folder)
        else:
            learn(engine, data, task.note)
            engine.reuse.save(folder)
        return banks_of(engine)


def _trial(
    task: TuningTask,
    config: EngineConfig,
    banks: Sequence[BankSnapshot],
    data: list[Replays],
    rungs: Sequence[Rung],
    label: str,
) -> MeasuredPrompts:
    with task.make_engine(config) as engine:
        give_banks(engine, banks)
        return measure(engine, data[1], rungs, task.folder / "outcomes.jsonl", label, task.note)


def _calibrate(
    task: TuningTask, engine: Engine, chosen: Chosen, data: Replays, policy: ReusePolicy
) -> dict[str, Reader]:
    """Pairs of every reader, with the chosen banks and rungs; all of them again if that was interrupted."""
    give_banks(engine, chosen.banks)
    readers = calibrate(engine, data, policy, task.note)
    folder = task.folder / BANKS
    if folder.exists():
        shutil.rmtree(folder)
    engine.reuse.save(folder)
    return readers


def _verify(
    task: TuningTask, engine: Engine, data: Replays, readers: Mapping[str, Reader], policy: ReusePolicy
) -> dict[str, VerificationTable]:
    """Every ladder on rows that nothing was chosen by, as if requests were served along it alone."""
    measured = measure(engine, data, policy.rungs, task.folder / "verified.jsonl", "verification", task.note)
    num_requests = len(data.rows) * (len(task.team.agents) - 1)
    return {
        ladder[0].estimator: judge(
            measured,
            calibrations(engine, readers, ladder, policy),
            ladder,
            task.bound,
            num_requests=num_requests,
        )
        for ladder in policy.ladders
    }


def _agent(engine: Engine, reader: Reader) -> AgentTable:
    found = engine.reuse.parts.book.find(engine.namespace(), reader.digest)
    return AgentTable(reader=reader.digest, num_pairs=0 if found is None else len(found.pairs))


def _bound(policy: ReusePolicy) -> BoundTable:
    return BoundTable(
        max_divergence=policy.max_divergence,
        confidence=policy.confidence,
        basis=Level(policy.basis).value,
    )


def _settings(config: EngineConfig) -> SettingsTable:
    return SettingsTable(
        neighbors=config.neighbors,
        alpha=config.alpha,
        sketch_groups=config.sketch_groups,
        sketch_layers=config.sketch_layers,
        anchor_bytes=config.anchor_bytes,
    )


def _data(task: TuningTask, split: Split) -> DataTable:
    parts = {name: tuple(row.digest for row in rows) for name, rows in split._asdict().items()}
    return DataTable(file=task.data_name, rule=RULE, **parts)


def _validity(task: TuningTask) -> ValidityTable:
    versions = {name: version(name) for name in ("kvcomm", "torch", "transformers")}
    return ValidityTable(
        holds_for=HOLDS_FOR,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        budget_s=task.budget_s,
        versions={**versions, "python": platform.python_version()},
    )
