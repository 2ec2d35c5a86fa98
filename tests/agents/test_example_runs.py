"""Example inputs of a team, and its answers cut to a length."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcomm.agents.agent import Agent
from kvcomm.agents.example_runs import examples, limited
from kvcomm.agents.team import Team, load_team
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest


def test_examples_come_from_the_package_or_a_file(tmp_path: Path) -> None:
    team = load_team("gsm8k")
    assert examples(team)[0].keys() == {"question"}
    assert len(examples(team)) >= 20
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert examples(team, tmp_path / "a.txt") == [{"question": "one"}, {"question": "two"}]
    (tmp_path / "a.jsonl").write_text('{"question": "one"}\n')
    assert examples(team, tmp_path / "a.jsonl") == [{"question": "one"}]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InvalidRequest, match=r"b\.jsonl needs an object"):
        examples(team, tmp_path / "b.jsonl")
    with pytest.raises(InvalidRequest, match=r"none\.txt cannot be read"):
        examples(team, tmp_path / "none.txt")
    with pytest.raises(InvalidRequest, match="needs the inputs"):
        examples(Team("two", agents=(Agent("a", prompt="{x} {y}"),)))


def test_answers_are_cut_to_a_length() -> None:
    team = Team("two", agents=(Agent("a", sampling=SamplingParams(max_new_tokens=9)), Agent("b")))
    assert [agent.sampling.max_new_tokens for agent in limited(team, 3).agents if agent.sampling] == [3, 3]
