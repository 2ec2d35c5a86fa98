"""A team's readings on an engine: teaching, contests, calibration, and what every reader's prompt costs when moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import NonNegativeInt

from kvcomm.agents.example_runs import Note, publish
from kvcomm.agents.tuning.answers import TeamRun, readers
from kvcomm.agents.tuning.rows import Row
from kvcomm.agents.tuning.state import Kept, append_line, damaged, read_kept
from kvcomm.align.bank import BankSnapshot
from kvcomm.align.groups import EdgeGroup
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.lab.variant import Variant
from kvcomm.reuse.decision import Rungs
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Outcome

EngineMaker = Callable[[EngineConfig], Engine]
"""Makes an engine on the model that is tuned."""


class KeptOutcomes(Kept):
    """What the prompts of a row cost: agent -> tokens that were moved, and the fields of one outcome per variant."""

    row: str
    key: str
    agents: dict[str, tuple[NonNegativeInt, tuple[tuple[float, float, float, float | None, NonNegativeInt], ...]]]

    @property
    def outcomes(self) -> dict[str, tuple[int, list[Outcome]]]:
        """The outcomes themselves."""
        return {
            agent: (num_moved, [Outcome(*each) for each in outcomes])
            for agent, (num_moved, outcomes) in self.agents.items()
        }


Measured = dict[str, list[Rungs]]
"""Agent -> for every prompt one outcome per variant."""


class Replays(NamedTuple):
    """Rows and their exact runs, in the same order."""

    rows: Sequence[Row]
    runs: Sequence[TeamRun]


def publish_run(engine: Engine, run: TeamRun) -> None:
    """Let an engine read a run exactly, so that its texts can be moved."""
    publish(engine, [(reading.prompt, reading.answer) for reading in run.values()])


def learn(engine: Engine, data: Replays, note: Note) -> None:
    """Teach the banks of every edge."""
    for index, run in enumerate(data.runs):
        note(f"banks: row {index + 1} of {len(data.runs)}")
        publish_run(engine, run)
        for reading in readers(run).values():
            engine.learn(reading.prompt).result()
        engine.clear_cache()


def banks_of(engine: Engine) -> list[BankSnapshot]:
    """What an engine has learned, to be given to another one."""
    return [bank.snapshot() for bank in engine.reuse.anchors.banks(engine.namespace())]


def give_banks(engine: Engine, banks: Sequence[BankSnapshot]) -> None:
    """Let an engine whose sketches are made alike begin with these banks."""
    for bank in banks:
        engine.reuse.anchors.bank(engine.namespace(), bank.edge).replace(bank)


def calibrate(
    engine: Engine, data: Replays, policy: ReusePolicy, note: Note, groups: dict[str, EdgeGroup], what: str
) -> None:
    """Let every prompt take part in what its group is at; fills `groups`, agent by agent."""
    for index, run in enumerate(data.runs):
        note(f"{what}: row {index + 1} of {len(data.runs)}")
        publish_run(engine, run)
        for agent, reading in readers(run).items():
            group = engine.calibrate(reading.prompt, reading.answer, policy).result()
            if group is not None:
                groups.setdefault(agent, group)
        engine.clear_cache()


def measure(
    engine: Engine,
    data: Replays,
    variants: Sequence[Variant],
    strengths: Mapping[str, float],
    file: Path,
    label: str,
    note: Note,
) -> Measured:
    """Replay every reader's prompt in every variant, but for the rows that the file has under this label.

    Args:
        strengths: agent -> factor on the token estimator's correction; agents that are missing are left out.
        label: for people, and with settings, anchors, variants and strengths it says what a line of the file holds.
    """
    taught = sorted((bank.edge.digest[:16], bank.num_tokens) for bank in banks_of(engine))
    asked = [tuple(vars(each).values()) for each in variants]
    key = f"{label} {vars(engine.config)} {taught} {asked} {sorted(strengths.items())}"
    known = {kept.row: kept.outcomes for kept in read_kept(file, KeptOutcomes) if kept.key == key}
    if any(len(each) != len(variants) for agents in known.values() for _, each in agents.values()):
        raise damaged(file, f"a line does not have the outcomes of {len(variants)} variants")
    found: Measured = {}
    for index, (row, run) in enumerate(zip(data.rows, data.runs, strict=True)):
        if row.digest not in known:
            note(f"{label}: row {index + 1} of {len(data.rows)}")
            known[row.digest] = _replayed(engine, run, variants, strengths)
            append_line(file, {"row": row.digest, "key": key, "agents": known[row.digest]})
        for agent, (num_moved, outcomes) in known[row.digest].items():
            found.setdefault(agent, []).append(Rungs(num_moved, outcomes))
    return found


def _replayed(
    engine: Engine, run: TeamRun, variants: Sequence[Variant], strengths: Mapping[str, float]
) -> dict[str, tuple[int, list[Outcome]]]:
    publish_run(engine, run)
    found = {}
    for agent, reading in readers(run).items():
        if agent not in strengths:
            continue
        wanted = list(_with_strength(variants, strengths[agent]))
        outcomes = engine.measure(reading.prompt, reading.answer, wanted).result()
        if outcomes:
            found[agent] = (reading.num_moved, outcomes)
    engine.clear_cache()
    return found


def _with_strength(variants: Sequence[Variant], strength: float) -> Iterator[Variant]:
    for each in variants:
        yield replace(each, strength=strength) if each.estimator == "token" else each
