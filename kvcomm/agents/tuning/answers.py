"""Exact runs of a team, kept line by line: prompts as segments, answers as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from kvcomm.agents.example_runs import BATCH, Note, require_no_adapters, run_all
from kvcomm.agents.learning import shortened
from kvcomm.agents.team import Team
from kvcomm.agents.tuning.rows import Row
from kvcomm.agents.tuning.state import Kept, append_line, read_kept
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy


class AgentReading(NamedTuple):
    """What one agent read, and what it answered."""

    prompt: tuple[Segment, ...]
    answer: tuple[int, ...]

    @property
    def num_moved(self) -> int:
        """Prompt tokens that can come from other contexts."""
        return sum(len(segment.token_ids) for segment in self.prompt if segment.name is not None)


TeamRun = dict[str, AgentReading]
"""Agent -> reading, in the order of the team."""

LATER = (
    "skip_special_tokens",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_tokens",
    "prompt_logprobs",
    "grammar",
)
"""Settings that came after the first profiles."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class KeptRun(Kept):
    """A row's run: agent -> (slot, token ids) of every segment of its prompt, and the token ids of its answer."""

    row: str
    agents: dict[str, tuple[tuple[tuple[str | None, tuple[TokenId, ...]], ...], tuple[TokenId, ...]]]

    @property
    def run(self) -> TeamRun:
        """The run itself."""
        return {
            name: AgentReading(tuple(Segment(ids, slot) for slot, ids in prompt), answer)
            for name, (prompt, answer) in self.agents.items()
        }


def greedy(team: Team) -> Team:
    """The team as it is tuned: the bound compares greedy answers.

    Raises:
        InvalidRequest: a team of one agent has nothing to move; runs of several rounds, and agents with adapters,
            are not tuned.
    """
    require_no_adapters(team)
    if len(team.agents) < 2:
        raise InvalidRequest(f"team {team.name!r} has one agent: there is nothing to move")
    if team.rounds != 1:
        raise InvalidRequest(f"team {team.name!r} runs {team.rounds} rounds; only teams of one round can be tuned")
    agents = (
        replace(each, sampling=replace(each.sampling or SamplingParams(), temperature=0.0)) for each in team.agents
    )
    return replace(team, agents=tuple(agents))


def team_digest(team: Team) -> str:
    """SHA-256 (hex) of agents, sampling, rounds and default inputs; names of teams do not count."""
    agents = [
        [
            each.name,
            each.system,
            each.prompt,
            _described(each.sampling),
            *([each.grammar.source] if each.grammar else []),
        ]
        for each in team.agents
    ]
    described = json.dumps([agents, team.rounds, dict(team.inputs)], sort_keys=True, default=list)
    return hashlib.sha256(described.encode()).hexdigest()


def _described(sampling: SamplingParams | None) -> dict[str, object] | None:
    """The settings; later ones only where they are set, so that what was tuned before need not be tuned anew."""
    if sampling is None:
        return None
    defaults = asdict(SamplingParams())
    return {key: value for key, value in asdict(sampling).items() if key not in LATER or value != defaults[key]}


def exact_runs(engine: Engine, team: Team, rows: Sequence[Row], file: Path, note: Note) -> list[TeamRun]:
    """The team's exact run on every row, from the file where it is there.

    Answers that nobody reads end after the tokens by which divergence is measured.
    """
    known = {kept.row: kept.run for kept in read_kept(file, KeptRun)}
    missing = [row for row in rows if row.digest not in known]
    team = replace(team, agents=shortened(team.agents))
    group = team.group(engine, policy=ReusePolicy.exact())
    for first in range(0, len(missing), BATCH):
        batch = missing[first : first + BATCH]
        note(f"exact runs: {first + 1} to {first + len(batch)} of {len(missing)}")
        results = run_all(group, [row.inputs for row in batch], team)
        engine.cache.clear()
        for row, result in zip(batch, results, strict=True):
            run = {name: AgentReading(result[name].prompt, result[name].token_ids) for name in result}
            append_line(file, {"row": row.digest, "agents": _json(run)})
            known[row.digest] = run
    return [known[row.digest] for row in rows]


def _json(run: TeamRun) -> dict[str, object]:
    return {
        name: [[[segment.name, list(segment.token_ids)] for segment in reading.prompt], list(reading.answer)]
        for name, reading in run.items()
    }
