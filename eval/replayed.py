"""What moved KV would have cost every reader of a team's exact runs, rung by rung, kept line by line.

A run is gone through in the order in which its agents answered, so a reader's text comes from what ran before it. What
is measured of a run depends on the model, the rungs and the runs that taught the banks; a file keeps all of it under a
digest of these, so an interrupted measurement goes on where it was, and with other settings begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eval.command import note
from eval.tasks.records import RecordFile
from eval.team_answers import Reading, Run, in_order
from kvcomm import Engine, Rung
from kvcomm.errors import InvalidRequest
from kvcomm.lab.bounds import Measured, Pair, Rungs
from kvcomm.lab.moving import Ladder, Outcome, Reader, ladders_of, reader_of

WORST = 1e6
"""Nats that are written down where a divergence is not finite."""


@dataclass(frozen=True)
class Replayed:
    """One reader's prompt, replayed at every rung.

    Attributes:
        num_moved: tokens that were moved before a rung computed some of them.
        outcomes: by rung; those that could be measured.
    """

    agent: str
    reader: Reader
    num_moved: int
    outcomes: Mapping[Rung, Outcome]

    def along(self, ladder: Ladder) -> Rungs:
        """What the rungs of a ladder gave, in its order."""
        return Rungs(self.num_moved, [self.outcomes[rung] for rung in ladder])

    @property
    def pair(self) -> Pair:
        """As an example to calibrate on."""
        return Pair(
            {rung: Measured(each.divergence, each.residual) for rung, each in self.outcomes.items()},
            {rung.estimator: each.distance for rung, each in self.outcomes.items()},
        )


ByAgent = Mapping[str, Sequence[Replayed]]
"""Agent -> what was measured of its prompts, run by run."""


@dataclass(frozen=True)
class Kept:
    """A line of the file: one run under one digest.

    Attributes:
        agents: name -> (tokens moved, outcomes by rung).
    """

    digest: str
    agents: dict[str, Any]

    @classmethod
    def of(cls, digest: str, found: Sequence[Replayed]) -> Self:
        """The line of a run."""
        agents = {
            each.agent: (each.num_moved, {str(rung): tuple(outcome) for rung, outcome in each.outcomes.items()})
            for each in found
        }
        return cls(digest, agents)

    def replayed(self, run: Run, rungs: Sequence[Rung]) -> list[Replayed]:
        """What was measured of the run, at these rungs."""
        return [
            Replayed(
                agent,
                reader_of(run[agent].prompt),
                num_moved,
                {rung: Outcome(*outcomes[str(rung)]) for rung in rungs if str(rung) in outcomes},
            )
            for agent, (num_moved, outcomes) in self.agents.items()
        ]


class OutcomeFile:
    """Outcomes of runs, measured once. One set of rungs, and banks that certain runs have taught."""

    def __init__(self, file: Path, engine: Engine, rungs: Sequence[Rung], teaching: Sequence[Run]) -> None:
        """Raises InvalidRequest where the file is there and cannot be read."""
        self._file = RecordFile(file, lambda value: Kept(**value))
        self._engine = engine
        self._rungs = tuple(rungs)
        taught = [content_of(run) for run in teaching]
        self._setting = json.dumps([engine.namespace(), list(map(str, rungs)), taught])
        self._known = {each.digest: each for each in self._file.read()}

    def is_whole(self, runs: Sequence[Run]) -> bool:
        """Whether nothing is left to measure of some runs."""
        return all(self._digest(run) in self._known for run in runs)

    def measure(self, runs: Sequence[Run], what: str) -> dict[str, list[Replayed]]:
        """What each rung gave for every reader of the runs; what is not known is measured now, run by run.

        Args:
            what: for people, what the runs are for.
        """
        found: dict[str, list[Replayed]] = {}
        for index, run in enumerate(runs):
            digest = self._digest(run)
            if digest not in self._known:
                note(f"{what}: question {index + 1} of {len(runs)}")
                self._known[digest] = Kept.of(digest, self._measure(run))
                self._file.add([self._known[digest]])
            for each in self._known[digest].replayed(run, self._rungs):
                found.setdefault(each.agent, []).append(each)
        return found

    def _measure(self, run: Run) -> list[Replayed]:
        found = []
        for agent, reading in in_order(self._engine, run):
            outcomes = self._outcomes(agent, reading)
            if outcomes:
                found.append(Replayed(agent, reader_of(reading.prompt), num_moved(reading, outcomes), outcomes))
        return found

    def _outcomes(self, agent: str, reading: Reading) -> dict[Rung, Outcome]:
        """By rung, but for those whose estimator knows nothing about some segment of the prompt."""
        try:
            return self._at(self._rungs, reading)
        except InvalidRequest:
            found: dict[Rung, Outcome] = {}
            for ladder in ladders_of(self._rungs):
                try:
                    found |= self._at(ladder, reading)
                except InvalidRequest as error:
                    note(f"agent {agent}: {error}")
            return found

    def _at(self, rungs: Sequence[Rung], reading: Reading) -> dict[Rung, Outcome]:
        outcomes = self._engine.reuse.measure(reading.prompt, reading.answer, rungs).result()
        return {
            rung: outcome._replace(divergence=min(outcome.divergence, WORST))
            for rung, outcome in zip(rungs, outcomes, strict=bool(outcomes))
        }

    def _digest(self, run: Run) -> str:
        return hashlib.sha256(f"{self._setting}{content_of(run)}".encode()).hexdigest()


def num_moved(reading: Reading, outcomes: Mapping[Rung, Outcome]) -> int:
    """Tokens of a prompt that were moved: all of its slots, or fewer where a segment had no source.

    A rung takes its share of the moved tokens, rounded down, so none of those that it left can have been more.
    """
    limits = [int((outcome.num_recomputed + 1) / rung.share - 1e-9) for rung, outcome in outcomes.items() if rung.share]
    return min([reading.num_movable, *limits])


def content_of(run: Run) -> str:
    """Everything that was read and written."""
    values = {
        name: [[(each.name, each.token_ids) for each in reading.prompt], reading.answer]
        for name, reading in run.items()
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
