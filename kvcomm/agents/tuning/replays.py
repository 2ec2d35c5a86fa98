"""A team's readings on an engine: teaching, calibrating, and what every reader's prompt costs when text is moved.

Agents read one after the other, and each is looked at before it has read itself: so text flows from its first reader to
the others, as it does where a team is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import NonNegativeInt

from kvcomm.agents.example_runs import Note, publish
from kvcomm.agents.tuning.answers import AgentReading, TeamRun
from kvcomm.agents.tuning.rows import Row
from kvcomm.agents.tuning.state import Kept, append_line, damaged, read_kept
from kvcomm.align.bank import BankSnapshot
from kvcomm.align.ladder import Ladder, Rung, ladders_of
from kvcomm.align.readers import Reader, reader_of
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.decision import Rungs
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Outcome

EngineMaker = Callable[[EngineConfig], Engine]
"""Makes an engine on the model that is tuned."""

Fields = tuple[float, float, float, float | None, NonNegativeInt]
"""Of an outcome."""


class KeptOutcomes(Kept):
    """What the prompts of a row cost: agent -> tokens that can be moved, and one outcome per rung asked for; null where
    too little was known of the prompt's edges."""

    row: str
    key: str
    agents: dict[str, tuple[NonNegativeInt, tuple[Fields | None, ...]]]

    def prompts(self, rungs: Sequence[Rung]) -> dict[str, ReplayedPrompt]:
        """The prompts themselves. Raises ValueError where there are not as many outcomes as rungs."""
        return {
            agent: ReplayedPrompt(
                num_moved,
                {rung: Outcome(*each) for rung, each in zip(rungs, outcomes, strict=True) if each is not None},
            )
            for agent, (num_moved, outcomes) in self.agents.items()
        }


class ReplayedPrompt(NamedTuple):
    """One prompt of a reader: tokens that can be moved, and what each rung gave; those that could be measured."""

    num_moved: int
    outcomes: Mapping[Rung, Outcome]

    def along(self, ladder: Ladder) -> Rungs | None:
        """What a ladder gave; None where one of its rungs could not be measured."""
        if not all(rung in self.outcomes for rung in ladder):
            return None
        return Rungs(self.num_moved, [self.outcomes[rung] for rung in ladder])


MeasuredPrompts = dict[str, list[ReplayedPrompt]]
"""Agent -> its prompts."""


class Replays(NamedTuple):
    """Rows and their exact runs, in the same order."""

    rows: Sequence[Row]
    runs: Sequence[TeamRun]


def turns(engine: Engine, run: TeamRun) -> Iterator[tuple[str, AgentReading]]:
    """Every agent of a run in its turn, but the first one, who has nobody to take text from; empties the cache."""
    for index, (agent, reading) in enumerate(run.items()):
        if index and reading.answer:
            yield agent, reading
        publish(engine, [(reading.prompt, reading.answer)])
    engine.cache.clear()


def learn(engine: Engine, data: Replays, note: Note) -> None:
    """Teach the banks of every edge."""
    for index, run in enumerate(data.runs):
        note(f"banks: row {index + 1} of {len(data.runs)}")
        for _, reading in turns(engine, run):
            engine.reuse.learn(reading.prompt).result()


def banks_of(engine: Engine) -> list[BankSnapshot]:
    """What an engine has learned, to be given to another one."""
    return [bank.snapshot() for bank in engine.reuse.parts.anchors.banks(engine.namespace())]


def give_banks(engine: Engine, banks: Sequence[BankSnapshot]) -> None:
    """Let an engine whose sketches are made alike begin with these banks."""
    for bank in banks:
        engine.reuse.parts.anchors.bank(engine.namespace(), bank.edge).replace(bank)


def calibrate(engine: Engine, data: Replays, policy: ReusePolicy, note: Note) -> dict[str, Reader]:
    """Add every prompt to the pairs of its reader; returns the readers, agent by agent."""
    readers: dict[str, Reader] = {}
    for index, run in enumerate(data.runs):
        note(f"calibration: row {index + 1} of {len(data.runs)}")
        for agent, reading in turns(engine, run):
            if engine.reuse.calibrate(reading.prompt, reading.answer, policy).result() is not None:
                readers[agent] = reader_of(engine.read_prompt(reading.prompt, is_start=True))
    return readers


def measure(
    engine: Engine, data: Replays, rungs: Sequence[Rung], file: Path, label: str, note: Note
) -> MeasuredPrompts:
    """Replay every reader's prompt at every rung, but for the rows that the file has under this label.

    Args:
        label: for people, and with settings, anchors and rungs it says what a line of the file holds.
    """
    taught = sorted((bank.edge.digest[:16], bank.num_tokens) for bank in banks_of(engine))
    key = f"{label} {vars(engine.config)} {taught} {[(each.estimator, each.share, each.chooser) for each in rungs]}"
    try:
        known = {kept.row: kept.prompts(rungs) for kept in read_kept(file, KeptOutcomes) if kept.key == key}
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise damaged(file, f"a line does not have the outcomes of {len(rungs)} rungs") from error
    found: MeasuredPrompts = {}
    for index, (row, run) in enumerate(zip(data.rows, data.runs, strict=True)):
        if row.digest not in known:
            note(f"{label}: row {index + 1} of {len(data.rows)}")
            known[row.digest] = replayed(engine, run, rungs)
            agents = {
                agent: (prompt.num_moved, [prompt.outcomes.get(rung) for rung in rungs])
                for agent, prompt in known[row.digest].items()
            }
            append_line(file, {"row": row.digest, "key": key, "agents": agents})
        for agent, prompt in known[row.digest].items():
            found.setdefault(agent, []).append(prompt)
    return found


def replayed(engine: Engine, run: TeamRun, rungs: Sequence[Rung]) -> dict[str, ReplayedPrompt]:
    """What every rung gives on the prompts of a run; agents into whose prompts nothing can be moved are left out."""
    found = {}
    for agent, reading in turns(engine, run):
        outcomes = _outcomes(engine, reading, rungs)
        if outcomes:
            found[agent] = ReplayedPrompt(reading.num_moved, outcomes)
    return found


def _outcomes(engine: Engine, reading: AgentReading, rungs: Sequence[Rung]) -> dict[Rung, Outcome]:
    try:
        return dict(zip(rungs, engine.reuse.measure(reading.prompt, reading.answer, rungs).result(), strict=False))
    except InvalidRequest:  # one of the estimators knows too little about an edge
        ladders = ladders_of(rungs)
        if len(ladders) == 1:
            return {}
        return {rung: each for ladder in ladders for rung, each in _outcomes(engine, reading, ladder).items()}
