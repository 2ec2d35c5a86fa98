"""Warming up from examples, and what a group says about its agents: on a tiny team, and once on the real model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvcomm.agents.agent import Agent
from kvcomm.agents.comparison import compare
from kvcomm.agents.example_runs import examples
from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.agents.team import Team, load_team
from kvcomm.align.standings import Level
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.warming import Done
from kvcomm.errors import EngineClosed, InvalidRequest, PromptTooLong, TemplateError
from kvcomm.model.loading import LoadedModel
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy
from tests.agents.teams import LOOSE, SAMPLING, TEAM, inputs
from tests.engine.conftest import ROWS_ONLY
from tests.tiny import tiny_model


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        engine.reuse.parts.cost.model = ROWS_ONLY
        yield engine
        engine.check_integrity()


def test_a_warm_team_moves_text_in_its_first_run(engine: Engine) -> None:
    """Where nobody reads along: what was read need not be moved."""
    group = TEAM.group(engine, policy=LOOSE, read_along=False)
    told: list[Done] = []
    before = group.status()
    assert {name: status.reason for name, status in before.items()} == dict.fromkeys(before, Reason.UNCALIBRATED)
    gained = group.warm(inputs(6), progress=told.append)
    assert list(gained) == ["first", "second", "third"]
    assert [each.num_prompts for each in gained.values()] == [6, 6, 6]
    assert (gained["first"].num_pairs, gained["first"].num_tokens) == (0, 0)  # it reads nobody
    for name in ("second", "third"):
        assert gained[name].num_pairs == 6
        assert gained[name].num_tokens == sum(edge.num_tokens for edge in group.status(name).edges) > 0
        assert gained[name].level is Level.OWN
    assert [done.num_done for done in told] == list(range(1, 37))
    assert {done.num_total for done in told} == {36}
    result = group.run(**inputs(1, "y")[0])
    for name in ("second", "third"):
        approximation = result[name].usage.approximation
        assert approximation is not None
        assert approximation.reader == group.status(name).reader
        assert approximation.rung == gained[name].status.rung
        assert result[name].usage.aligned_tokens > 0
    engine.wait_idle()


def test_examples_are_run_exactly_whatever_is_known(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody reads along, whose requests would be no lessons."""
    monkeypatch.delattr(Engine, "open_prompt")
    group = TEAM.group(engine, policy=LOOSE)
    group.warm(inputs(6))
    counted = {standing.reader.digest: standing.num_approximated for standing in engine.reuse.readers()}
    group.warm(inputs(3, "z"))
    assert {standing.reader.digest: standing.num_approximated for standing in engine.reuse.readers()} == counted
    assert group.status("third").num_pairs(Level.OWN) == 9


def test_no_example_is_judged_by_its_own_anchors(engine: Engine) -> None:
    """Of the first ones nothing is known of corrections; each one is measured before it teaches."""
    TEAM.group(engine, policy=LOOSE).warm(inputs(1))
    for standing in engine.reuse.readers():
        for pair in standing.pairs:
            assert {rung.estimator for rung in pair.measured} == {"rotate"}
    assert sum(bank.snapshot().num_tokens for bank in engine.reuse.parts.anchors.banks(engine.namespace())) > 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], InvalidRequest, "there are no examples to learn from"),
        ([{"question": "a"}, {}], TemplateError, r"example 2: agent 'first', placeholder \{question\}"),
        ([{"question": "a", "topic": "b"}], TemplateError, "example 1: input 'topic' is read by no agent"),
        ([{"question": "a"}, {"question": "b"}, "c"], InvalidRequest, "example 3 must be a mapping of inputs to texts"),
        ([{"question": "a"}, {"question": "b " * 600}], PromptTooLong, "example 2: agent 'first'"),
    ],
)
def test_bad_examples_are_named_before_anything_runs(
    engine: Engine, given: Any, error: type[Exception], message: str
) -> None:
    group = TEAM.group(engine, policy=LOOSE)
    with pytest.raises(error, match=message):
        group.warm(given)
    assert engine.reuse.readers() == []
    assert engine.cache.stats().num_cached == 0


def test_an_exact_policy_has_nothing_to_learn(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="exact reuse only, which has nothing to learn"):
        TEAM.group(engine).warm(inputs(2))
    assert [each.bound for each in TEAM.group(engine).status().values()] == [None, None, None]


def test_a_closed_engine_says_so_before_and_meanwhile(engine: Engine) -> None:
    group = TEAM.group(engine, policy=LOOSE)

    def close(done: Done) -> None:
        if done.text == "learning":
            engine.close()

    with pytest.raises(EngineClosed):
        group.warm(inputs(2), progress=close)
    with pytest.raises(EngineClosed):
        group.warm(inputs(2))
    assert not [each for each in threading.enumerate() if each.name.startswith("kvcomm-agent")]


def test_a_reader_is_the_same_whatever_its_slots_hold(engine: Engine) -> None:
    """Bug: a slot without a value left no segment, so an agent in its first round was another reader than later."""
    group = KVCommAgentGroup(engine, policy=LOOSE, sampling=SAMPLING)
    group.add(Agent("a", system="You argue.", prompt="{topic}. They said: {b@previous}. Now you."))
    group.add(Agent("b", system="You doubt.", prompt="{topic}. They said: {a}."))
    results = [group.run(rounds=2, topic=topic) for topic in ("apples", "", "pears, say, or plums")]
    engine.wait_idle()
    wanted = {status.reader for status in group.status().values()}
    assert {standing.reader.digest for standing in engine.reuse.readers()} == wanted
    prompts = [answers["a"].prompt for result in results for answers in result.rounds]
    assert {engine.reuse.status(prompt).reader for prompt in prompts} == {group.status("a").reader}


def test_a_status_asked_of_nobody_is_one_line(engine: Engine) -> None:
    group = TEAM.group(engine, policy=LOOSE).add(Agent("alone", prompt="Say something."))
    with pytest.raises(InvalidRequest, match="the group has no agent 'fourth'; it has first, second, third, alone"):
        group.status("fourth")
    with pytest.raises(InvalidRequest, match="agent 'alone' has no placeholder"):
        group.status("alone")
    assert "alone" not in group.status()


def test_every_approximated_answer_of_a_comparison_is_audited(engine: Engine) -> None:
    TEAM.group(engine, policy=LOOSE).warm(inputs(6))
    agents = compare(engine, TEAM, inputs(3, "y"), LOOSE)
    assert [agent.agent for agent in agents] == ["first", "second", "third"]
    assert all(len(agent.usages) == len(agent.dense_s) == len(agent.exact_s) == 3 for agent in agents)
    approximated = [agent for agent in agents if agent.rungs]
    assert [agent.agent for agent in approximated] == ["second", "third"]
    assert all(len(agent.audited) == len(agent.rungs) == len(agent.predicted) for agent in approximated)


def test_a_small_pool_gives_lessons_up_and_counts_them(engine: Engine) -> None:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=512)) as small:
        gained = TEAM.group(small, policy=LOOSE).warm(inputs(8))
        pairs = {standing.reader.digest: len(standing.pairs) for standing in small.reuse.readers()}
        for each in gained.values():
            assert each.num_pairs == pairs.get(each.status.reader, 0)
        small.check_integrity()


def test_the_real_team_is_warm_after_a_few_examples(smollm2: LoadedModel) -> None:
    """Two agents of gsm8k: pairs, anchors and a level, all from three examples."""
    packaged = load_team("gsm8k")
    agents = tuple(replace(each, sampling=replace(each.sampling, max_new_tokens=24)) for each in packaged.agents[:2])  # type: ignore[type-var]
    team = Team("two", agents)
    policy = ReusePolicy(max_divergence=5.0, confidence=0.7, basis="own")
    with Engine(smollm2.model, smollm2.tokenizer, weights_id=smollm2.weights_digest, prior=None) as engine:
        group = team.group(engine, policy=policy)
        gained = group.warm([{**packaged.inputs, **each} for each in examples(packaged)[:3]])
        last = agents[-1].name
        assert (gained[last].num_pairs, gained[last].level) == (3, Level.OWN)
        assert gained[last].num_tokens >= 64
        assert "own 3 of 3 pairs" in repr(group.status(last))
        engine.check_integrity()
