"""Warming up and comparing, on a tiny team: groups end up calibrated, every approximated answer audited."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcomm.agents.agent import Agent
from kvcomm.agents.comparison import compare
from kvcomm.agents.team import Team, load_team
from kvcomm.agents.warming import examples, limited, warm_up
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY
from tests.tiny import tiny_model

LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.5)
SAMPLING = SamplingParams(max_new_tokens=24, ignore_eos=True)
TEAM = Team(
    "tiny",
    agents=(
        Agent("first", system="You answer.", prompt="Q: {question}", sampling=SAMPLING),
        Agent("second", system="You check what others say.", prompt="Q: {question} A: {first}", sampling=SAMPLING),
        Agent("third", system="You decide.", prompt="Q: {question} A: {first} B: {second}", sampling=SAMPLING),
    ),
)


def inputs(count: int, stem: str = "x") -> list[dict[str, str]]:
    """Texts that have nothing in common."""
    return [{"question": hashlib.sha256(f"{stem}{index}".encode()).hexdigest()} for index in range(count)]


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(contest_prompts=2)) as engine:
        engine.reuse.cost.model = ROWS_ONLY
        yield engine
        engine.check_integrity()


def test_a_warm_team_is_calibrated_and_compared(engine: Engine) -> None:
    notes: list[str] = []
    warm_up(engine, TEAM, inputs(16), LOOSE, num_anchors=4, note=notes.append)
    pairs = [
        (tuple(edge.slot for edge, _ in group.key.edges), group.calibration.num_pairs) for group in engine.edge_groups()
    ]
    assert max(num for slots, num in pairs if slots == ("question", "first")) >= 7  # 9 exact runs less the contest's 2
    assert max(num for slots, num in pairs if slots == ("question", "first", "second")) >= 7
    assert notes[0] == "answering 1 to 13 of 13"
    assert notes[-1] == "learning in idle time"
    agents = compare(engine, TEAM, inputs(3, "y"), LOOSE)
    assert [agent.agent for agent in agents] == ["first", "second", "third"]
    assert all(len(agent.usages) == len(agent.dense_s) == len(agent.exact_s) == 3 for agent in agents)
    approximated = [agent for agent in agents if agent.rungs]
    assert approximated, [dict(agent.reasons) for agent in agents]
    assert all(len(agent.audited) == len(agent.rungs) == len(agent.predicted) for agent in approximated)
    assert not agents[0].rungs


def test_too_few_inputs_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="5 inputs are too few: 4 teach, at least 2 more calibrate"):
        warm_up(engine, TEAM, inputs(5), LOOSE, num_anchors=4)


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
    assert {agent.sampling.max_new_tokens for agent in limited(TEAM, 3).agents if agent.sampling} == {3}
