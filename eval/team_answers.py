"""Exact runs of a team of agents, kept in a file: prompts as segments, answers as token ids.

Fidelity is measured on what agents really read and write. Generating that takes most of the time, so it is done once:
a file of answers given to the next run is read instead, and continued where it ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data_files import rows_of
from eval.workload import note
from kvcomm import Engine, ReusePolicy
from kvcomm.agents.example_runs import run_all
from kvcomm.agents.team import load_team
from kvcomm.memory.segments import Segment

BATCH = 16
"""Questions that are answered at the same time."""


@dataclass(frozen=True)
class Reading:
    """What one agent read, and what it answered."""

    prompt: tuple[Segment, ...]
    answer: tuple[int, ...]

    @property
    def is_moved_into(self) -> bool:
        """Whether any of it could come from another context: it has a slot behind its role."""
        return any(segment.name is not None for segment in self.prompt)


Run = dict[str, Reading]
"""Agent -> reading."""


def team_runs(engine: Engine, team: str, questions: Sequence[str], file: Path | None) -> list[Run]:
    """The team's exact run on every question, from the file where it is there."""
    known = {} if file is None or not file.exists() else _read(file)
    missing = [question for question in dict.fromkeys(questions) if question not in known]
    for first in range(0, len(missing), BATCH):
        batch = missing[first : first + BATCH]
        note(f"answering questions {first + 1} to {first + len(batch)} of {len(missing)}")
        for question, run in zip(batch, _answer(engine, team, batch), strict=True):
            known[question] = run
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as out:
                    out.write(_line(question, run) + "\n")
    return [known[question] for question in questions]


def _answer(engine: Engine, team: str, questions: Sequence[str]) -> list[Run]:
    chosen = load_team(team)
    group = chosen.group(engine, policy=ReusePolicy.exact())
    results = run_all(group, [{"question": question} for question in questions], chosen)
    engine.clear_cache()
    return [{name: Reading(result[name].prompt, result[name].token_ids) for name in result} for result in results]


def _line(question: str, run: Run) -> str:
    agents = {
        name: {
            "prompt": [[segment.name, list(segment.token_ids)] for segment in reading.prompt],
            "answer": list(reading.answer),
        }
        for name, reading in run.items()
    }
    return json.dumps({"question": question, "agents": agents})


def _read(file: Path) -> dict[str, Run]:
    return dict(rows_of(file, _kept, "a question and its answers as this program writes them"))


def _kept(entry: Any) -> tuple[str, Run]:
    run = {
        name: Reading(tuple(Segment(tuple(ids), slot) for slot, ids in each["prompt"]), tuple(each["answer"]))
        for name, each in entry["agents"].items()
    }
    return entry["question"], run
