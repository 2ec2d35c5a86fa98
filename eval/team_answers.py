"""Exact runs of a team of agents, kept in a file: prompts as segments, answers as token ids.

Fidelity is measured on what agents really read and write. Generating that takes most of the time, so it is done once:
a file of answers given to the next run is read instead, and continued where it ends. Whoever looks at a run goes
through it `in_order`, so that every reader finds what ran before it, as it did then, and nothing of later ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.command import note
from eval.data_files import rows_of
from kvcomm import Engine, ReusePolicy, Segment
from kvcomm.agents import GroupResult, load_team
from kvcomm.lab.teams import publish, run_all

BATCH = 16
"""Questions that are answered at the same time."""


@dataclass(frozen=True)
class Reading:
    """What one agent read, and what it answered."""

    prompt: tuple[Segment, ...]
    answer: tuple[int, ...]

    @property
    def reads(self) -> frozenset[str]:
        """Names of its slots; those of agents are what they answered."""
        return frozenset(segment.name for segment in self.prompt if segment.name is not None)

    @property
    def num_movable(self) -> int:
        """Prompt tokens that could come from other contexts."""
        return sum(len(segment.token_ids) for segment in self.prompt if segment.name is not None)


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


def run_of(result: GroupResult) -> Run:
    """What the agents of a group's run read and answered, in its last round."""
    return {name: Reading(result[name].prompt, result[name].token_ids) for name in result}


def in_order(engine: Engine, run: Run) -> Iterator[tuple[str, Reading]]:
    """Every agent that reads others and has answered, each as long as the cache holds what ran before it and no more.

    Whoever reads others comes after them, wherever it stands in the team. Begins with an empty cache, ends with one.
    """
    engine.cache.clear()
    for index, (name, reading) in enumerate(_ordered(run)):
        if index and reading.answer and reading.num_movable:
            yield name, reading
        publish(engine, [(reading.prompt, reading.answer)])
    engine.cache.clear()


def _ordered(run: Run) -> Iterator[tuple[str, Reading]]:
    """As a team answers: in its order, but nobody before those whose answers stand in its prompt."""
    left = dict(run)
    while left:
        free = (name for name, reading in left.items() if not reading.reads & left.keys() - {name})
        name = next(free, next(iter(left)))  # in a ring somebody begins
        yield name, left.pop(name)


def _answer(engine: Engine, team: str, questions: Sequence[str]) -> list[Run]:
    chosen = load_team(team)
    group = chosen.group(engine, policy=ReusePolicy.exact())
    results = run_all(group, [{"question": question} for question in questions], chosen)
    engine.cache.clear()
    return [run_of(result) for result in results]


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
