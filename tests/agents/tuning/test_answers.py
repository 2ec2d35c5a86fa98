"""Exact runs: what is asked of the agents, by a group that only looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcomm import SamplingParams
from kvcomm.agents.agent import Agent
from kvcomm.agents.team import Team
from kvcomm.agents.tuning import answers
from kvcomm.agents.tuning.answers import exact_runs
from kvcomm.agents.tuning.rows import Row
from kvcomm.reuse.replay import NUM_CONTINUATION


def agent(name: str, prompt: str, num_tokens: int | None) -> Agent:
    return Agent(name, "You answer.", prompt, None if num_tokens is None else SamplingParams(max_new_tokens=num_tokens))


def test_answers_that_nobody_reads_end_where_divergence_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are not read by anybody, so the rest of them was time for nothing. What others read stays whole."""
    asked: dict[str, int] = {}

    def run_all(group: Any, inputs: Sequence[Mapping[str, str]], team: Team) -> list[dict[str, Any]]:
        for each in team.agents:
            asked[each.name] = (each.sampling or SamplingParams()).max_new_tokens
        return [{each.name: SimpleNamespace(prompt=(), token_ids=(1,)) for each in team.agents} for _ in inputs]

    monkeypatch.setattr(answers, "run_all", run_all)
    monkeypatch.setattr(Team, "group", lambda *arguments, **named: None)
    team = Team(
        "panel",
        (
            agent("first", "{question}", 96),
            agent("second", "{question} {first}", 96),
            agent("brief", "{question}", 8),
            agent("unset", "{first}", None),
        ),
    )
    engine: Any = SimpleNamespace(cache=SimpleNamespace(clear=lambda: None))
    exact_runs(engine, team, [Row({"question": "?"}, "abc")], tmp_path / "answers.jsonl", lambda text: None)
    assert asked == {"first": 96, "second": NUM_CONTINUATION, "brief": 8, "unset": NUM_CONTINUATION}
