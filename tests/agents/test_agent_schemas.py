"""Agents that answer by a schema: what the next one reads is JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvcomm import Agent, Engine, Grammar, KVCommAgentGroup, SamplingParams
from kvcomm.agents.team import load_team
from kvcomm.errors import InvalidRequest
from tests.tiny import TinyModel

VERDICT = {"type": "object", "properties": {"is_right": {"type": "boolean"}}, "required": ["is_right"]}


def test_a_group_of_them(tiny: TinyModel) -> None:
    solver = Agent("solver", json_schema={"enum": [1, 2, 3]})
    judge = Agent("judge", prompt="{question} {solver}", json_schema=VERDICT, sampling=SamplingParams(temperature=1.0))
    with Engine(tiny.model, tiny.tokenizer) as engine:
        group = KVCommAgentGroup(engine, sampling=SamplingParams(max_new_tokens=60))
        group.add(solver)
        group.add(judge)
        answers = group.run(question="how many?")
    assert json.loads(answers["solver"].text) in (1, 2, 3)
    assert isinstance(json.loads(answers["judge"].text)["is_right"], bool)


def test_one_that_cannot_be_followed_is_named_before_anything_runs(tiny: TinyModel) -> None:
    with Engine(tiny.model, tiny.tokenizer) as engine:
        group = KVCommAgentGroup(engine)
        group.add(Agent("free"))
        group.add(Agent("picky", json_schema={"type": "array", "uniqueItems": True}))
        with pytest.raises(InvalidRequest, match=r"agent 'picky'.*'uniqueItems'"):
            group.run(question="?")


def test_an_agent_is_still_a_value() -> None:
    one, same = Agent("a", json_schema=VERDICT), Agent("a", json_schema=json.dumps(VERDICT))
    assert one == same
    assert len({one, same, Agent("a")}) == 2
    assert replace(one, name="b").grammar == Grammar.json_schema(VERDICT)
    with pytest.raises(InvalidRequest, match="not both"):
        Agent("a", json_schema={}, sampling=SamplingParams(grammar=Grammar.regex("a")))


def test_from_a_team_file(tmp_path: Path) -> None:
    file = tmp_path / "team.toml"
    file.write_text('[[agents]]\nname = "a"\n[agents.json_schema]\ntype = "integer"\n')
    (agent,) = load_team(file).agents
    assert agent.grammar == Grammar.json_schema({"type": "integer"})
    file.write_text('[[agents]]\nname = "a"\njson_schema = "{"\n')
    with pytest.raises(InvalidRequest, match=r"number 1.*no JSON"):
        load_team(file)
    file.write_text('[[agents]]\nname = "a"\n[agents.sampling]\ngrammar = "x"\n')
    with pytest.raises(InvalidRequest, match="unknown key 'grammar'"):
        load_team(file)
