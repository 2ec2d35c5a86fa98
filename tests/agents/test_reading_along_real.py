"""Agents that read along on a real engine with a tiny random model: the same answers, and nothing left of a run.

How much is spare beside answers is measured, so here it is always enough: what is read along does not depend on how
fast the machine is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.agents import (
    Agent,
    AgentFailed,
    AgentFinished,
    AgentText,
    GroupResult,
    KVCommAgentGroup,
)
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.engine.spare import Spare
from kvcomm.errors import PoolTooSmall, PromptTooLong
from kvcomm.model.loading import LoadedModel
from tests.agents.teams import reading_teams
from tests.agents.tiny_engine import make_engine
from tests.limits import wait_for

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def always_spare() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spare, "num_rows", lambda *_: 64)
        yield


@pytest.fixture(scope="module")
def plain_engine() -> Iterator[Engine]:
    """Computes every prompt on its own."""
    with make_engine(cache=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    shared_engine.cache.clear()
    yield shared_engine
    require_nothing_left(shared_engine)


def require_nothing_left(engine: Engine) -> None:
    """Of a run: no request, no open prompt, no page but the cache's."""
    wait_for(lambda: not engine.scheduler.requests() and not engine.scheduler.read_along.readings)
    engine.check_integrity()
    engine.cache.clear()
    assert engine.pool.num_free == engine.pool.num_pages


def group_of(engine: Engine, *agents: Agent, **settings: Any) -> KVCommAgentGroup:
    group = KVCommAgentGroup(engine, **{"sampling": GREEDY, **settings})
    for agent in agents:
        group.add(agent)
    return group


TEAM = (
    Agent("solver", system="Solve it.", prompt="Question: {question}"),
    Agent("analyst", system="Analyse it, slowly.", prompt="{question} {analyst@previous}"),
    Agent("critic", system="Criticise what others say.", prompt="{question} said {solver}, said {analyst}, done."),
    Agent("judge", system="Judge all of it.", prompt="{critic@previous} {critic} {solver} Which one? {question}"),
)


def said(result: GroupResult) -> list[dict[str, Any]]:
    """Prompts and answers, round by round."""
    return [{name: (each.prompt, each.token_ids) for name, each in answers.items()} for answers in result.rounds]


def test_answers_are_read_while_they_are_written(engine: Engine) -> None:
    """The first token of an agent that has read along waits for little more than what was written last."""
    result = group_of(engine, *TEAM).run(question="1 + 1?")
    critic = result["critic"]
    role = next(segment for segment in critic.prompt if segment.name is None)
    assert critic.usage.read_along_tokens >= len(role.token_ids) + len(result["solver"].token_ids) // 2
    assert critic.usage.reasons["read_along"] == critic.usage.read_along_tokens
    assert critic.usage.computed_tokens + critic.usage.exact_tokens == critic.usage.prompt_tokens
    without = group_of(engine, *TEAM, read_along=False).run(question="2 + 2?")
    assert without["critic"].usage.read_along_tokens == 0


def test_rounds_and_what_was_said_before(engine: Engine, plain_engine: Engine) -> None:
    # Who ends a round writes less than who is read in the next one, which so goes on when its reader can begin.
    longer = SamplingParams(max_new_tokens=96, ignore_eos=True)
    team = [replace(agent, sampling=longer) if agent.name == "analyst" else agent for agent in TEAM]
    result = group_of(engine, *team).run(rounds=3, question="why?")
    assert said(result) == said(group_of(plain_engine, *team, read_along=False).run(rounds=3, question="why?"))
    later = [answers["critic"].usage for answers in result.rounds[1:]]
    assert all(usage.read_along_tokens for usage in later)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    drawn = {"temperature": 1.0, "seed": 3} if draw(st.booleans()) else {}
    return SamplingParams(max_new_tokens=draw(st.sampled_from([0, 1, 9, 24])), ignore_eos=draw(st.booleans()), **drawn)


@settings(max_examples=15, deadline=None)
@given(reading_teams(), st.data())
def test_prompts_and_answers_are_the_same_with_and_without(
    shared_engine: Engine, plain_engine: Engine, team: tuple[dict[str, str], int], data: st.DataObject
) -> None:
    """Whatever agents read, and whatever ends their answers: a stop string and a stop token are such as come up."""
    prompts, rounds = team
    agents = [Agent(name, prompt=prompt, sampling=data.draw(samplings())) for name, prompt in prompts.items()]
    free = group_of(plain_engine, *agents, read_along=False).run(rounds, q="why?")
    for index, agent in enumerate(agents):
        answer, way = free.rounds[0][agent.name], data.draw(st.sampled_from(["free", "string", "token"]))
        assert agent.sampling is not None
        at = data.draw(st.integers(0, max(0, len(answer.token_ids) - 1)))
        if way == "string" and answer.text:
            stop = answer.text[at % len(answer.text) :][:2]
            agents[index] = replace(agent, sampling=replace(agent.sampling, stop=(stop,)))
        elif way == "token" and answer.token_ids:
            agents[index] = replace(agent, sampling=replace(agent.sampling, stop_token_ids=(answer.token_ids[at],)))
    wanted = group_of(plain_engine, *agents, read_along=False).run(rounds, q="why?")
    assert said(group_of(shared_engine, *agents).run(rounds, q="why?")) == said(wanted)
    require_nothing_left(shared_engine)


def test_several_runs_at_a_time(engine: Engine, plain_engine: Engine) -> None:
    group, alone = group_of(engine, *TEAM), group_of(plain_engine, *TEAM, read_along=False)
    questions = [f"{number} + {number}?" for number in range(6)]

    async def together() -> list[GroupResult]:
        return await asyncio.gather(*(group.arun(2, question=text) for text in questions[:3]))

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda text: group.run(2, question=text), questions[3:]))
    for text, result in zip(questions, [*asyncio.run(together()), *found], strict=True):
        assert said(result) == said(alone.run(2, question=text))


@pytest.mark.parametrize("num_events", [1, 12, 60])
def test_closing_a_run_returns_what_was_read_along(engine: Engine, num_events: int) -> None:
    with closing(group_of(engine, *TEAM).stream(2, question="1 + 1?")) as events:
        for _ in range(num_events):
            next(events)
    require_nothing_left(engine)
    assert group_of(engine, *TEAM).run(question="1 + 1?")["judge"].finish_reason == "length"


def test_closing_a_run_whose_answers_are_being_followed(engine: Engine) -> None:
    with closing(group_of(engine, *TEAM).stream(question="1 + 1?")) as events:
        for event in events:
            read = [each.sequence.num_computed for each in engine.scheduler.read_along.readings]
            if isinstance(event, AgentText) and any(read):
                break
    assert not engine.scheduler.requests()


def test_an_agent_that_fails_while_others_follow_it() -> None:
    with make_engine(num_slots=512) as small:
        agents = [
            Agent("a", prompt="x", sampling=SamplingParams(max_new_tokens=30, ignore_eos=True)),
            Agent("b", prompt="{a}", sampling=SamplingParams(max_new_tokens=2000)),
            Agent("c", prompt="{a}{b}"),
        ]
        with pytest.raises(AgentFailed, match="agent 'b' failed in round 1: PoolTooSmall") as caught:
            group_of(small, *agents).run()
        assert isinstance(caught.value.__cause__, PoolTooSmall)
        require_nothing_left(small)


def test_a_request_that_is_cancelled_behind_the_groups_back(engine: Engine) -> None:
    with closing(group_of(engine, *TEAM).stream(question="1 + 1?")) as events:
        next(events)
        engine.scheduler.cancel(engine.scheduler.requests()[0])
        with pytest.raises(AgentFailed, match="RequestCancelled"):
            list(events)


def test_answers_that_become_too_long_for_their_reader(engine: Engine) -> None:
    agents = [Agent("a", prompt="a"), Agent("b", prompt="b" * 4000 + "{a}{a}{a}{a}{a}")]
    with pytest.raises(PromptTooLong, match=r"agent 'b': its prompt of 41\d\d tokens .* largest slots: \{a\} 24"):
        group_of(engine, *agents).run()


def test_a_pool_without_room_for_open_prompts(plain_engine: Engine) -> None:
    """What is read along is the first to go when pages are needed; the answers are the same."""
    with make_engine(num_slots=640) as small:
        agents = [replace(agent, system=agent.system * 4) for agent in TEAM]
        found = said(group_of(small, *agents).run(2, question="1 + 1?"))
        require_nothing_left(small)
    assert found == said(group_of(plain_engine, *agents, read_along=False).run(2, question="1 + 1?"))


def test_agents_with_nothing_spare(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(Spare, "num_rows", lambda *_: 0)
    answers: dict[str, Any] = {}
    with closing(group_of(engine, *TEAM).stream(question="1 + 1?")) as events:
        for event in events:
            if isinstance(event, AgentFinished):
                answers[event.agent] = event.result.usage
    assert answers["critic"].reasons.get("no_spare", 0) > 0


def test_a_chain_of_the_real_model(smollm2: LoadedModel) -> None:
    """Each agent is asked for what the one before has just written, and says what it says without reading along."""
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    agents = [
        Agent("solver", system="You solve problems.", prompt="{question}", sampling=sampling),
        Agent("critic", system="You check what others say.", prompt="{question} They say: {solver}", sampling=sampling),
    ]
    with Engine(smollm2.model, smollm2.tokenizer, weights_id=smollm2.weights_digest) as engine:
        found = group_of(engine, *agents).run(question="What is 17 times 4?")
        engine.cache.clear()
        wanted = group_of(engine, *agents, read_along=False).run(question="What is 17 times 4?")
        assert said(found) == said(wanted)
        assert found["critic"].usage.read_along_tokens > 0
        require_nothing_left(engine)
