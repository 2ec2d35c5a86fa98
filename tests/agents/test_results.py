"""What a group gives back, outside of it: pickled, as JSON, and at a glance."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator

import pytest

from kvcomm import Agent, Engine, EngineConfig, KVCommAgentGroup, ReusePolicy, SamplingParams
from kvcomm.agents import AgentFailed, GroupFinished, GroupResult, RoundFinished, beam, load_team, packaged_teams
from tests.tiny import tiny_model

GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)
LINE = 200


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A tiny engine."""
    made = tiny_model()
    with Engine(made.model, made.tokenizer, config=EngineConfig(page_size=4, pool_tokens=2048)) as engine:
        yield engine


@pytest.fixture
def group(engine: Engine) -> KVCommAgentGroup:
    """One solves, two read it."""
    group = KVCommAgentGroup(engine, sampling=GREEDY)
    group.add(Agent("solver", system="Solve.", prompt="{question}{critic@previous}"))
    group.add(Agent("critic", prompt="{question} {solver}"))
    return group.add(Agent("judge", prompt="{solver}"))


@pytest.fixture
def result(group: KVCommAgentGroup) -> GroupResult:
    """Of two rounds."""
    return group.run(question="how many apples?", rounds=2)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_result_survives_pickling(result: GroupResult, protocol: int) -> None:
    found = pickle.loads(pickle.dumps(result, protocol))
    assert type(found) is GroupResult
    assert found == result
    assert (found.rounds, found.final, found.total_s) == (result.rounds, result.final, result.total_s)
    assert found["judge"].usage == result["judge"].usage
    with pytest.raises(TypeError):
        found.rounds[0]["solver"] = found["judge"]  # as read-only as before


def test_a_result_can_be_copied(result: GroupResult) -> None:
    for found in (copy.copy(result), copy.deepcopy(result)):
        assert (found.rounds, found.final, found.total_s) == (result.rounds, result.final, result.total_s)


def test_events_survive_pickling(group: KVCommAgentGroup) -> None:
    events = list(group.stream(question="how many?"))
    assert {type(event) for event in events} >= {RoundFinished, GroupFinished}
    assert pickle.loads(pickle.dumps(events)) == events


def test_a_result_as_json(result: GroupResult) -> None:
    value = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(value) == ["rounds", "final", "total_s"]
    assert [list(answers) for answers in value["rounds"]] == [["solver", "critic", "judge"]] * 2
    assert value["final"] == [answer.name for answer in result.final] == ["critic", "judge"]
    assert value["total_s"] == result.total_s
    answer = value["rounds"][1]["critic"]
    assert list(answer) == [
        "name",
        "round",
        "text",
        "token_ids",
        "prompt",
        "usage",
        "finish_reason",
        "started_s",
        "finished_s",
    ]
    assert (answer["name"], answer["round"]) == ("critic", 2)
    assert (answer["text"], answer["token_ids"]) == (result["critic"].text, list(result["critic"].token_ids))
    assert answer["prompt"] == [
        {"token_ids": list(each.token_ids), "name": each.name} for each in result["critic"].prompt
    ]
    assert answer["usage"] == result["critic"].usage.to_dict()
    assert answer == result["critic"].to_dict()


def test_results_at_a_glance(result: GroupResult) -> None:
    assert repr(result).startswith("GroupResult(critic: ")
    assert repr(result).endswith(f"; 3 agents, 2 rounds, {result.total_s:.3g} s)")
    assert repr(result["judge"]).startswith("AgentResult(judge, round 2: ")
    assert ", length, " in repr(result["judge"])
    for each in (result, *result.values()):
        assert len(repr(each)) < LINE


def test_many_agents_at_a_glance(engine: Engine) -> None:
    group = KVCommAgentGroup(engine, sampling=GREEDY, policy=ReusePolicy(max_divergence=0.02))
    assert repr(group) == f"KVCommAgentGroup(no agents; up to 0.02 nats at 0.95; {engine!r})"
    for index in range(20):
        group.add(Agent(f"agent{index}", prompt="{question}" * 30))
    assert repr(group).startswith("KVCommAgentGroup(agent0, agent1, agent2, agent3, agent4, agent5 and 14 more; up to ")
    assert len(repr(group)) < 2 * LINE
    result = group.run(question="?")
    assert "and 17 more; 20 agents, " in repr(result)
    assert len(repr(result)) < 2 * LINE


def test_an_agent_at_a_glance() -> None:
    agent = Agent("solver", system="You solve. " * 20, sampling=GREEDY)
    assert (
        repr(agent)
        == f"Agent('solver', system={('You solve. ' * 4)[:39] + '…'!r}, prompt='{{question}}', own sampling)"
    )
    assert pickle.loads(pickle.dumps(agent)) == agent


@pytest.mark.parametrize("name", packaged_teams())
def test_teams_survive_pickling(name: str) -> None:
    team = load_team(name)
    assert pickle.loads(pickle.dumps(team)) == copy.deepcopy(team) == team


def test_a_failure_survives_pickling() -> None:
    found = pickle.loads(pickle.dumps(AgentFailed("critic", 2, ValueError("broken"))))
    assert (found.agent, found.round, str(found.__cause__)) == ("critic", 2, "broken")
    assert str(found) == "agent 'critic' failed in round 2: ValueError: broken"


def test_a_search_result_as_json(engine: Engine) -> None:
    with engine.context("how many") as root, beam(root, None, lambda context, text: 0.5, width=1, max_depth=1) as found:
        value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert list(value) == ["texts", "scores", "is_complete", "stats"]
        assert value["texts"] == list(found.texts)
        assert value["stats"]["num_scored"] == found.stats.num_scored
        assert repr(found).startswith("SearchResult(")
        assert len(repr(found)) < LINE
