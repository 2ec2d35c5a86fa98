"""Agents with adapters of their own on one engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcomm import Agent, Engine, KVCommAgentGroup
from kvcomm.agents import load_team
from kvcomm.agents.example_runs import require_no_adapters
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, UnknownAdapter
from tests.lora import save_lora
from tests.tiny import tiny_model

TEAM = """
[[agents]]
name = "writer"
prompt = "Write of {question}."
adapter = "poet"
[[agents]]
name = "critic"
prompt = "Judge {writer}."
adapter = "judge"
[[agents]]
name = "reader"
prompt = "Read {writer}, {critic}."
"""
SAMPLING = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as made:
        for seed, name in enumerate(("poet", "judge"), start=1):
            made.adapters.load(name, save_lora(tmp_path / name, seed=seed))
        yield made


def test_every_agent_answers_with_its_adapter(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "team.toml"
    file.write_text(TEAM)
    group = load_team(file).group(engine, sampling=SAMPLING)
    answers = group.run(question="a dog", rounds=2)

    for name, adapter in (("writer", "poet"), ("critic", "judge"), ("reader", None)):
        prompt = list(answers[name].prompt)
        for other in (None, "poet", "judge"):
            cold = engine.generate(prompt, SAMPLING, adapter=other, tenant=f"cold {other}")
            assert (cold.text == answers[name].text) is (other == adapter)


def test_unknown_adapters_are_found_before_anything_runs(engine: Engine) -> None:
    group = KVCommAgentGroup(engine, sampling=SAMPLING).add(Agent("writer", prompt="{question}"))
    group.add(Agent("critic", prompt="{writer}", adapter="bard"))
    with pytest.raises(UnknownAdapter, match="agent 'critic': the engine has no adapter 'bard'; loaded: judge, poet"):
        group.run(question="a dog")


def test_adapters_of_a_file_are_names(tmp_path: Path) -> None:
    file = tmp_path / "team.toml"
    file.write_text(TEAM.replace('"poet"', "3"))
    with pytest.raises(InvalidRequest, match="adapter must be text, got 3"):
        load_team(file)


def test_teams_with_adapters_are_not_tuned(tmp_path: Path) -> None:
    file = tmp_path / "team.toml"
    file.write_text(TEAM)
    with pytest.raises(InvalidRequest, match="agent 'writer' has the adapter 'poet'"):
        require_no_adapters(load_team(file))
