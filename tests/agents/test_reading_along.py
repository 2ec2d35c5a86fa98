"""Agents that read along: what is opened, given and closed, on an engine without a model."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.agents import Agent, AgentFailed, AgentStarted, GroupFinished, KVCommAgentGroup
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, NumericalError, PromptTooLong, SourceFailed
from tests.agents.fakes import FakeEngine, FakeOpenPrompt, byte_tokenizer
from tests.agents.teams import reading_teams


def plain_engine(answer: Callable[[str], str | Exception] = str.upper, **settings: Any) -> FakeEngine:
    """An engine without a chat template that answers when it is told to, so that prompts are the agents' texts."""
    return FakeEngine(answer, gated=True, tokenizer=byte_tokenizer(None), **settings)


def group_of(engine: FakeEngine, *, read_along: bool = True, **prompts: str) -> KVCommAgentGroup:
    group = KVCommAgentGroup(engine, read_along=read_along)
    for name, prompt in prompts.items():
        group.add(Agent(name, prompt=prompt))
    return group


def answer(engine: FakeEngine, agent: str, round: int = 1) -> None:
    """Let the oldest request in flight answer, which is this agent's; back when all that follows has been done."""
    (thread,) = (each for each in threading.enumerate() if each.name == f"kvcomm-agent-{agent}-{round}")
    engine.finish(next(index for index, handle in enumerate(engine.handles) if not handle.done))
    thread.join()


def test_an_agent_is_given_what_is_known_of_its_prompt_and_follows_the_rest() -> None:
    engine = plain_engine()
    with closing(group_of(engine, a="a{q}", b="say {q}, {a}, {c}.", c="c{a}").stream(q="x")) as events:
        next(events)
        b, c = engine.open_prompts
        assert (b.text, b.names) == ("say x, ", [None, "q", None, "a", None])  # and waits for c, which has not begun
        assert (c.text, c.names) == ("c", [None, "a"])
        answer(engine, "a")
        assert c.is_closed
        assert b.text == "say x, AX, "
        assert b.names == [None, "q", None, "a", None, "c", None]
        answer(engine, "c")
        assert b.is_closed
        answer(engine, "b")
        assert isinstance(list(events)[-1], GroupFinished)
    assert engine.prompts == ["ax", "cAX", "say x, AX, CAX."]
    assert len(engine.open_prompts) == 2


def test_readers_follow_an_answer_without_its_end() -> None:
    engine = plain_engine(lambda text: f"{text}!#<|end|>")
    stop = engine.tokenizer.encode("#")
    group = KVCommAgentGroup(engine).add(Agent("a", prompt="a", sampling=SamplingParams(stop_token_ids=stop)))
    with closing(group.add(Agent("b", prompt="{a}?")).add(Agent("c", prompt="{b}")).stream()) as events:
        next(events)
        answer(engine, "a")
        answer(engine, "b")
    assert engine.prompts == ["a", "a!?", "a!?!#"]  # what is a stop token to one agent is none to another


def test_a_round_is_opened_when_the_agent_has_begun_the_one_before() -> None:
    engine = plain_engine()
    group = group_of(engine, solver="s{critic@previous}", critic="c{solver}")
    with closing(group.stream(rounds=3)) as events:
        next(events)
        # solver, round 2: critic has not begun; critic, round 1: follows solver
        assert [(each.text, each.names) for each in engine.open_prompts] == [("c", [None, "solver"]), ("s", [None])]
        answer(engine, "solver")
        assert engine.open_prompts[1].names == [None, "critic@previous"]
        assert [each.is_open for each in engine.open_prompts] == [False, True, True]  # the last: critic, round 2
        answer(engine, "critic")
        for round in (2, 3):
            answer(engine, "solver", round)
            answer(engine, "critic", round)
        assert isinstance(list(events)[-1], GroupFinished)
    assert len(engine.open_prompts) == 5  # all but the solver's first
    assert not any(each.is_open for each in engine.open_prompts)


def test_who_has_nothing_to_wait_for_has_no_open_prompt() -> None:
    engine = plain_engine()
    with closing(group_of(engine, a="{q}", b="b").stream(rounds=2, q="x")) as events:
        next(events)
        for round in (1, 2):
            answer(engine, "a", round)
            answer(engine, "b", round)
    assert engine.open_prompts == []
    assert len(engine.prompts) == 4


def test_a_group_that_does_not_read_along() -> None:
    engine = plain_engine()
    with closing(group_of(engine, read_along=False, a="a", b="{a}").stream()) as events:
        next(events)
        answer(engine, "a")
        answer(engine, "b")
    assert engine.open_prompts == []
    assert engine.prompts == ["a", "A"]


def test_an_open_prompt_is_the_agents() -> None:
    engine = plain_engine()
    engine.adapters = SimpleNamespace(names=("poet",))  # type: ignore[attr-defined]
    group = KVCommAgentGroup(engine, tenant="acme", sampling=SamplingParams(max_new_tokens=7))
    group.add(Agent("a", prompt="a")).add(
        Agent("b", prompt="{a}", adapter="poet", sampling=SamplingParams(max_new_tokens=9))
    )
    with closing(group.stream()) as events:
        next(events)
        answer(engine, "a")
        answer(engine, "b")
    assert engine.open_prompts[0].settings == {"adapter": "poet", "tenant": "acme", "policy": group.policy}
    assert [each.max_new_tokens for each in engine.samplings] == [7, 9]


def test_passages_of_an_input_stand_in_an_open_prompt_as_in_the_prompt() -> None:
    engine = plain_engine()
    with closing(group_of(engine, a="a", b="{docs}|{a}").stream(docs=["one", "two"])) as events:
        next(events)
        assert engine.open_prompts[0].text == "one\n\ntwo|"
        answer(engine, "a")
        answer(engine, "b")
    assert engine.prompts[1] == "one\n\ntwo|A"


def short(text: str) -> str:
    """Some answer to a text; now and then an empty one."""
    return "" if sum(text.encode()) % 5 == 0 else f"<{sum(text.encode()) % 1000}>"


@settings(max_examples=60, deadline=None)
@given(reading_teams(), st.integers(0, 2**32))
def test_prompts_and_answers_are_the_same_with_and_without(team: tuple[dict[str, str], int], seed: int) -> None:
    prompts, rounds = team
    found = []
    for read_along in (True, False):
        engine, chooser = plain_engine(short), random.Random(seed)
        with closing(group_of(engine, read_along=read_along, **prompts).stream(rounds, q="why?")) as events:
            num_started = 0
            for event in events:
                num_started += isinstance(event, AgentStarted)
                num_open = sum(each.is_open for each in engine.open_prompts)
                assert num_open <= len(prompts)
                running = [index for index, handle in enumerate(engine.handles) if not handle.done]
                if num_started == len(engine.handles) and running:
                    engine.finish(chooser.choice(running))
                if isinstance(event, GroupFinished):
                    found.append(event.result)
        assert not any(each.is_open for each in engine.open_prompts)
        if read_along:
            waits = [name for name, prompt in prompts.items() if re.search(r"\{a\d\}", prompt)]
            assert len(engine.open_prompts) >= len(waits) * rounds
    texts = [
        [{name: (each.prompt, each.token_ids) for name, each in answers.items()} for answers in result.rounds]
        for result in found
    ]
    assert texts[0] == texts[1]


def test_closing_a_run_cancels_its_open_prompts() -> None:
    engine = plain_engine()
    events = group_of(engine, a="a", b="{a}", c="{b}").stream(rounds=2)
    next(events)
    assert sum(each.is_open for each in engine.open_prompts) == 2
    events.close()
    assert [each.is_cancelled for each in engine.open_prompts] == [True, True]
    assert engine.num_in_flight == 0


def test_a_failure_cancels_open_prompts_and_opens_no_more() -> None:
    engine = plain_engine(lambda text: NumericalError("NaN") if text == "a" else text)
    with closing(group_of(engine, a="a", b="{a}", c="{b}{a}").stream(rounds=2)) as events:
        next(events)
        engine.finish(0)
        with pytest.raises(AgentFailed, match="agent 'a' failed in round 1: NumericalError: NaN"):
            list(events)
    assert len(engine.open_prompts) == 2
    assert not any(each.is_open for each in engine.open_prompts)


def test_a_prompt_that_has_become_too_long() -> None:
    engine = plain_engine(lambda text: "long" * 10, max_context=300)
    with closing(group_of(engine, a="x", b="{a}{a} and {q}", c="{b}").stream(q="y")) as events:
        next(events)
        engine.finish(0)
        with pytest.raises(PromptTooLong, match=r"agent 'b': its prompt of 86 tokens"):
            list(events)
    assert not any(each.is_open for each in engine.open_prompts)


@pytest.mark.parametrize("when", ["open", "append", "follow", "close"])
def test_what_cannot_be_read_along_is_asked_for_as_ever(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open prompt that takes too long, or has become too long before a stop string cut what it follows."""
    engine = plain_engine()

    def failing(*operands: Any, **settings: Any) -> RequestHandle:
        raise SourceFailed("given up at its deadline")

    if when == "open":
        monkeypatch.setattr(engine, "open_prompt", failing)
    else:
        monkeypatch.setattr(FakeOpenPrompt, when, failing)
    with closing(group_of(engine, a="a", b="b{a}", c="c{b}").stream()) as events:
        next(events)
        for agent in "abc":
            answer(engine, agent)
        assert isinstance(list(events)[-1], GroupFinished)
    assert engine.prompts == ["a", "bA", "cBA"]
    assert not any(each.is_open for each in engine.open_prompts)
    assert len(engine.open_prompts) == (0 if when == "open" else 2)  # none is opened twice


def test_a_request_that_the_engine_refuses_fails_as_without_reading_along() -> None:
    engine = plain_engine()
    submit = engine.submit

    def refusing(prompt: Any, sampling: Any, **settings: Any) -> Any:
        if len(engine.handles) == 1:
            raise InvalidRequest("no")
        return submit(prompt, sampling, **settings)

    engine.submit = refusing  # type: ignore[method-assign]
    with closing(group_of(engine, a="a", b="{a}").stream()) as events:
        next(events)
        engine.finish(0)
        with pytest.raises(AgentFailed, match="agent 'b' failed in round 1: InvalidRequest: no"):
            list(events)
    assert not any(each.is_open for each in engine.open_prompts)
