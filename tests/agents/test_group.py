"""Groups on an engine without a model: order, events, rounds, and what is left when a run ends early."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.agents import (
    Agent,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    AgentText,
    GroupFinished,
    KVCommAgentGroup,
    RoundFinished,
)
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, NumericalError, PromptTooLong, TemplateError
from kvcomm.reuse.policy import ReusePolicy
from tests.agents.fakes import FakeEngine, byte_tokenizer


def plain_engine(answer: Callable[[str], str | Exception] | None = None, **settings: Any) -> FakeEngine:
    """An engine without a chat template, so that prompts are exactly the agents' texts."""
    settings.setdefault("tokenizer", byte_tokenizer(None))
    return FakeEngine(answer or (lambda text: text.upper()), **settings)


def group_of(engine: FakeEngine, **prompts: str) -> KVCommAgentGroup:
    group = KVCommAgentGroup(engine)
    for name, prompt in prompts.items():
        group.add(Agent(name, prompt=prompt))
    return group


def agent_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvcomm-agent")]


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    yield
    assert agent_threads() == []


def test_answers_flow_along_the_placeholders() -> None:
    engine = plain_engine()
    group = group_of(engine, critic="check {solver}", solver="solve {question}")
    answer = group.run(question="x?")
    assert engine.prompts == ["solve x?", "check SOLVE X?"]
    assert answer["critic"].text == "CHECK SOLVE X?"
    assert list(answer) == ["critic", "solver"]
    assert len(answer) == 2
    assert [result.name for result in answer.final] == ["critic"]
    assert answer.rounds == ({"critic": answer["critic"], "solver": answer["solver"]},)


def test_a_result_says_what_happened() -> None:
    group = group_of(plain_engine(), solver="solve {question}", critic="check {solver}")
    result = group.run(question="x?")
    solver, critic = result["solver"], result["critic"]
    assert solver.token_ids == tuple(byte_tokenizer().encode("SOLVE X?"))
    assert (solver.round, solver.finish_reason, solver.prompt_tokens) == (1, "stop", len("solve x?"))
    assert [segment.name for segment in critic.prompt] == [None, "solver"]
    assert critic.prompt[1].token_ids == solver.token_ids
    assert 0 <= solver.started_s <= solver.finished_s <= critic.started_s <= critic.finished_s == result.total_s


def test_sampling_of_agent_before_sampling_of_group() -> None:
    engine = plain_engine()
    group = KVCommAgentGroup(engine, sampling=SamplingParams(max_new_tokens=7), tenant="acme")
    group.add(Agent("a", prompt="x")).add(Agent("b", prompt="y", sampling=SamplingParams(max_new_tokens=9))).run()
    assert sorted(sampling.max_new_tokens for sampling in engine.samplings) == [7, 9]
    assert engine.tenants == ["acme", "acme"]


def test_rounds_read_the_round_before() -> None:
    engine = plain_engine(lambda text: f"({text})")
    result = group_of(engine, solver="s{critic@previous}", critic="c{solver}").run(rounds=3)
    assert [answers["critic"].text for answers in result.rounds] == [
        "(c(s))",
        "(c(s(c(s))))",
        "(c(s(c(s(c(s))))))",
    ]
    assert result["critic"].round == 3


def test_an_empty_answer_leaves_an_empty_segment() -> None:
    """So its reader is the same as with an answer."""
    engine = plain_engine(lambda text: "" if text == "a" else text)
    result = group_of(engine, first="a", second="b{first}").run()
    assert result["second"].text == "b"
    assert [(segment.name, len(segment.token_ids)) for segment in result["second"].prompt] == [(None, 1), ("first", 0)]


def test_the_same_group_runs_again() -> None:
    group = group_of(plain_engine(), a="{q}")
    assert [group.run(q=text)["a"].text for text in "xy"] == ["X", "Y"]


def test_events_of_one_agent() -> None:
    events = list(group_of(plain_engine(), a="{q}").stream(q="xy"))
    result = events[2 + 1].result  # type: ignore[union-attr]
    assert events == [
        AgentStarted("a", 1, 2),
        AgentText("a", 1, "X", tuple(byte_tokenizer().encode("X"))),
        AgentText("a", 1, "Y", tuple(byte_tokenizer().encode("Y"))),
        AgentFinished("a", 1, result),
        RoundFinished(1, {"a": result}),
        events[-1],
    ]
    assert isinstance(events[-1], GroupFinished)
    assert events[-1].result["a"] == result


def test_independent_agents_are_in_flight_together_and_their_texts_interleave() -> None:
    engine = plain_engine(gated=True)
    with closing(group_of(engine, a="a", b="b", c="{a}{b}").stream()) as events:
        assert [next(events), next(events)] == [AgentStarted("a", 1, 1), AgentStarted("b", 1, 1)]
        assert engine.num_in_flight == 2
        engine.finish(1)
        assert [type(next(events)) for _ in range(2)] == [AgentText, AgentFinished]
        assert len(engine.handles) == 2
        engine.finish(0)
        assert [type(next(events)) for _ in range(3)] == [AgentText, AgentFinished, AgentStarted]
        engine.finish(2)
        assert engine.prompts[2] == "AB"
        assert isinstance(list(events)[-1], GroupFinished)


def test_agents_start_without_anybody_reading_events() -> None:
    """A slow reader of events must not hold up the agents behind."""
    engine = plain_engine(gated=True)
    with closing(group_of(engine, a="a", b="{a}").stream()) as events:
        next(events)
        engine.finish(0)
        for thread in agent_threads():
            if thread.name == "kvcomm-agent-a-1":
                thread.join()
        assert engine.prompts == ["a", "A"]
        engine.finish(1)
        assert isinstance(list(events)[-1], GroupFinished)


def test_a_round_may_begin_before_the_one_before_has_ended() -> None:
    engine = plain_engine(gated=True)
    with closing(group_of(engine, quick="q", slow="s").stream(rounds=2)) as events:
        next(events), next(events)
        engine.finish(0)
        for event in events:
            if event == AgentStarted("quick", 2, 1):
                break
        assert engine.prompts == ["q", "s", "q"]


@st.composite
def teams(draw: st.DrawFn) -> tuple[dict[str, str], int]:
    """Random prompts without cycles: agents read agents before them, and anyone's previous answer."""
    num_agents = draw(st.integers(1, 6))
    prompts = {}
    for index in range(num_agents):
        reads = draw(st.sets(st.integers(0, index - 1))) if index else set()
        earlier = draw(st.sets(st.integers(0, num_agents - 1), max_size=2))
        slots = [f"{{a{i}}}" for i in sorted(reads)] + [f"{{a{i}@previous}}" for i in sorted(earlier)]
        prompts[f"a{index}"] = f"a{index}:{'.'.join(slots)};"
    order = draw(st.permutations(sorted(prompts)))
    return {name: prompts[name] for name in order}, draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(teams(), st.integers(0, 2**32))
def test_an_agent_starts_exactly_when_its_inputs_are_finished(team: tuple[dict[str, str], int], seed: int) -> None:
    prompts, rounds = team
    chooser = random.Random(seed)
    engine = plain_engine(lambda text: f"<{text}>", gated=True)
    started: list[tuple[str, int]] = []
    finished: set[tuple[str, int]] = set()
    with closing(group_of(engine, **prompts).stream(rounds)) as events:
        result = None
        for event in events:
            if isinstance(event, AgentStarted):
                started.append((event.agent, event.round))
            elif isinstance(event, AgentFinished):
                finished.add((event.agent, event.round))
            elif isinstance(event, GroupFinished):
                result = event.result
            running = [index for index, handle in enumerate(engine.handles) if not handle.done]
            startable = {task for task in every_task(prompts, rounds) if needs(prompts, task) <= finished}
            if isinstance(event, AgentStarted):
                assert (event.agent, event.round) in startable
            # Everything that can start has started once the engine is asked to go on.
            if len(started) == len(engine.handles) and set(started) == startable and running:
                engine.finish(chooser.choice(running))
    assert sorted(started) == sorted(every_task(prompts, rounds))
    assert result is not None
    assert {name: result[name].text for name in prompts} == naive_answers(prompts, rounds)


def every_task(prompts: dict[str, str], rounds: int) -> list[tuple[str, int]]:
    return [(name, number) for number in range(1, rounds + 1) for name in prompts]


def needs(prompts: dict[str, str], task: tuple[str, int]) -> set[tuple[str, int]]:
    name, number = task
    same = {(other, number) for other in re.findall(r"\{(\w+)\}", prompts[name])}
    before = {(other, number - 1) for other in re.findall(r"\{(\w+)@previous\}", prompts[name])} | {(name, number - 1)}
    return same | {other for other in before if other[1] > 0}


def naive_answers(prompts: dict[str, str], rounds: int) -> dict[str, str]:
    """The same by repeated substitution in plain strings."""
    answers: dict[str, str] = dict.fromkeys(prompts, "")
    for _ in range(rounds):
        previous, answers = answers, {}
        for name in sorted(prompts):  # agents read only agents with smaller numbers
            text = re.sub(r"\{(\w+)@previous\}", lambda slot: previous[slot[1]], prompts[name])  # noqa: B023
            answers[name] = "<" + re.sub(r"\{(\w+)\}", lambda slot: answers[slot[1]], text) + ">"  # noqa: B023
    return answers


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"agent 'a', placeholder \{q\}: neither an agent nor an input"),
        ({"q": "x", "b": "y"}, "input 'b' has the name of an agent"),
        ({"q": "x", "r": "y"}, "input 'r' is read by no agent"),
        ({"q": None}, "input 'q' must be text"),
    ],
)
def test_inputs_are_checked_before_anything_runs(inputs: dict[str, Any], message: str) -> None:
    engine = plain_engine()
    group = group_of(engine, a="{q}", b="{a}")
    for start in (group.run, group.stream, group.astream):
        with pytest.raises(TemplateError, match=message):
            start(**inputs)
    assert engine.handles == []


@pytest.mark.parametrize("rounds", [0, -1, 1.5])
def test_rounds_are_checked(rounds: Any) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f"rounds must be a whole number >= 1, got {rounds!r}")):
        group_of(plain_engine(), a="x").run(rounds=rounds)


def test_a_refused_agent_leaves_the_group_as_it_was() -> None:
    group = group_of(plain_engine(), a="{b}")
    for refused in (Agent("b", prompt="{a}"), Agent("a", prompt="")):
        with pytest.raises(TemplateError):
            group.add(refused)
    assert [agent.name for agent in group.agents] == ["a"]
    assert group.inputs == ("b",)


def test_prompt_too_long_by_its_inputs_alone() -> None:
    engine = plain_engine(max_context=20)
    group = KVCommAgentGroup(engine, sampling=SamplingParams(max_new_tokens=4))
    group.add(Agent("a", prompt="ab")).add(Agent("b", prompt="Q {q} {r} {a}"))
    assert group.run(q="x" * 8, r="y")["b"].text == "Q XXXXXXXX Y AB"
    num_requests = len(engine.handles)
    message = r"agent 'b': .* of 17 tokens plus max_new_tokens=4 exceeds .* 20 .*\{q\} 12, \{r\} 1, \{a\} 0"
    with pytest.raises(PromptTooLong, match=message):
        group.run(q="x" * 12, r="y")
    assert len(engine.handles) == num_requests


def test_prompt_too_long_by_an_answer() -> None:
    engine = plain_engine(lambda text: "long" * 10, max_context=300)
    group = group_of(engine, a="x", b="{a}{a} and {q}")
    with pytest.raises(PromptTooLong, match=r"agent 'b': its prompt of 86 tokens .* largest slots: \{a\} 40, \{q\} 1"):
        group.run(q="y")


def test_the_last_prompt_that_fits() -> None:
    engine = plain_engine(lambda text: "12345", max_context=10)
    sampling = SamplingParams(max_new_tokens=5)
    group = KVCommAgentGroup(engine, sampling=sampling).add(Agent("a", prompt="x")).add(Agent("b", prompt="{a}"))
    group.run()
    with pytest.raises(PromptTooLong):
        group.add(Agent("c", prompt="{a}!")).run()


def test_a_failure_cancels_the_others_and_names_the_agent() -> None:
    engine = plain_engine(lambda text: NumericalError("NaN") if text == "b" else text, gated=True)
    group = group_of(engine, a="a", b="b", c="{a}{b}")
    events = group.stream()
    next(events), next(events)
    engine.finish(1)
    with pytest.raises(AgentFailed, match="agent 'b' failed in round 1: NumericalError: NaN") as caught:
        list(events)
    assert isinstance(caught.value.__cause__, NumericalError)
    assert (caught.value.agent, caught.value.round) == ("b", 1)
    assert engine.num_in_flight == 0
    assert len(engine.handles) == 2


def test_an_agent_that_the_engine_refuses() -> None:
    engine = plain_engine()
    submit = engine.submit

    def refusing(prompt: Any, sampling: Any, **settings: Any) -> Any:
        if len(engine.handles) == 1:
            raise InvalidRequest("no")
        return submit(prompt, sampling, **settings)

    engine.submit = refusing  # type: ignore[method-assign]
    with pytest.raises(AgentFailed, match="agent 'b' failed in round 1: InvalidRequest: no"):
        group_of(engine, a="a", b="{a}").run()


def test_closing_the_stream_cancels_everything() -> None:
    engine = plain_engine(gated=True)
    events = group_of(engine, a="a", b="b").stream()
    next(events)
    assert engine.num_in_flight == 2
    events.close()
    assert engine.num_in_flight == 0


def test_a_stream_that_is_never_read_runs_nothing() -> None:
    engine = plain_engine()
    group_of(engine, a="a").stream()
    assert engine.handles == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_while_events_are_read(error: type[BaseException]) -> None:
    engine = plain_engine(gated=True)

    def read() -> None:
        with closing(group_of(engine, a="a", b="b").stream()) as events:
            for _ in events:
                raise error

    with pytest.raises(error):
        read()
    assert engine.num_in_flight == 0


def test_ctrl_c_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C raises inside the blocking wait for the next event."""
    engine = plain_engine(gated=True)

    class Interrupted:
        def put(self, event: object) -> None:
            pass

        def get(self) -> object:
            raise KeyboardInterrupt

    monkeypatch.setattr("kvcomm.agents.running.queue.SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        group_of(engine, a="a", b="b").run()
    assert len(engine.handles) == 2
    assert engine.num_in_flight == 0


def test_async_run_and_stream_equal_the_blocking_ones() -> None:
    async def both(group: KVCommAgentGroup) -> tuple[Any, list[Any]]:
        return await group.arun(q="x"), [event async for event in group.astream(q="x")]

    group = group_of(plain_engine(), a="{q}", b="{a}")
    result, events = asyncio.run(both(group))
    assert {name: answer.text for name, answer in result.items()} == {"a": "X", "b": "X"}
    kinds = [(type(event), getattr(event, "agent", None)) for event in events]
    assert [kind for kind in kinds if kind[1] == "b"] == [
        (AgentStarted, "b"),
        (AgentText, "b"),
        (AgentFinished, "b"),
    ]
    assert kinds[-1] == (GroupFinished, None)


def test_cancelling_the_task_cancels_the_run() -> None:
    engine = plain_engine(gated=True)

    async def cancelled() -> None:
        task = asyncio.create_task(group_of(engine, a="a", b="b").arun())
        while len(engine.handles) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_in_flight == 0

    asyncio.run(cancelled())


def test_async_failure_names_the_agent() -> None:
    engine = plain_engine(lambda text: NumericalError("NaN"))
    with pytest.raises(AgentFailed, match="agent 'a'"):
        asyncio.run(group_of(engine, a="a").arun())


def test_an_engine_that_was_given_stays_open() -> None:
    engine = plain_engine()
    with group_of(engine, a="x") as group:
        assert group.engine is engine
    assert not engine.is_closed


def test_model_and_tokenizer_make_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plain_engine()
    monkeypatch.setattr("kvcomm.engine.engine.Engine", lambda model, tokenizer, policy: made)
    with KVCommAgentGroup(object(), byte_tokenizer()) as group:  # type: ignore[arg-type]
        assert group.engine is made
    assert made.is_closed


def test_wrong_ways_to_make_a_group() -> None:
    with pytest.raises(InvalidRequest, match="object without a tokenizer"):
        KVCommAgentGroup(object())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="brings its own tokenizer"):
        KVCommAgentGroup(plain_engine(), byte_tokenizer())
    with pytest.raises(TemplateError, match="the group: sampling has n=3"):
        KVCommAgentGroup(plain_engine(), sampling=SamplingParams(n=3))


def test_the_policy_is_the_engines_unless_said_otherwise() -> None:
    engine = plain_engine()
    assert KVCommAgentGroup(engine).policy is engine.policy
    policy = ReusePolicy(max_divergence=0.02)
    group = KVCommAgentGroup(plain_engine(), policy=policy).add(Agent("a", prompt="x"))
    assert group.policy is policy
    assert group.run()["a"].text == "X"
