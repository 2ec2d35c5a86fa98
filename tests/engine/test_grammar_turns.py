"""Dear grammars take turns, and their looks at all tokens hold no lock: counted, with a cost that the test says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kvcomm import Engine, Grammar, SamplingParams
from kvcomm.engine import grammar_compiler
from kvcomm.engine.grammar_state import DEAR_S, GrammarState
from kvcomm.engine.grammar_turns import STEP_S, left_out

HOSTILE_S = 0.009
HOSTILE = Grammar.regex("[ab]{40}")
ORDINARY = Grammar.regex("[cd]{40}")
PROMPT = "Question: how many apples are left? Answer:"


class Costed(GrammarState):
    """A state with nothing but a cost."""

    def __init__(self, cost_s: float) -> None:
        self.cost_s = cost_s
        self.num_waited = 0


def test_ordinary_ones_are_never_left_out() -> None:
    assert left_out([Costed(0.9 * DEAR_S) for _ in range(1000)]) == set()


def test_dear_ones_share_a_part_of_the_step_and_all_have_their_turn() -> None:
    states: list[GrammarState] = [Costed(HOSTILE_S) for _ in range(10)]
    turns = dict.fromkeys(states, 0)
    for _ in range(10):
        taking_part = set(states) - left_out(states)
        assert len(taking_part) == 3  # the third begins before the time is over
        for state in taking_part:
            turns[state] += 1
    assert max(turns.values()) - min(turns.values()) <= 2


def test_one_takes_part_however_dear_it_is() -> None:
    states: list[GrammarState] = [Costed(10 * STEP_S), Costed(10 * STEP_S)]
    assert len(left_out(states)) == 1


class Looks:
    """Looks at all tokens, each of which costs what the test says."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, first_s: float = HOSTILE_S) -> None:
        """`first_s`: what the first one costs, when a grammar is compiled."""
        self.num_locked = 0
        self.by_step: list[int] = []
        self.is_shared: list[bool] = []  # step by step, whether somebody else was there
        real_look, real_step = GrammarState.look, engine.scheduler.step

        def look(state: GrammarState) -> None:
            is_new, before_s = state.must_look, state.cost_s
            real_look(state)
            state.cost_s = before_s
            if is_new:
                is_hostile = state._grammar == HOSTILE
                state.cost_s = max(HOSTILE_S if is_hostile else 0.0, before_s / 2)
                self.num_locked += is_hostile and engine.lock._is_owned()  # type: ignore[attr-defined]
                self.by_step[-1] += is_hostile

        def step() -> None:
            self.by_step.append(0)
            self.is_shared.append(len({request.tenant for request in engine.scheduler.requests()}) > 1)
            real_step()

        times = itertools.count()
        monkeypatch.setattr(grammar_compiler, "thread_time", lambda: next(times) * first_s)
        monkeypatch.setattr(GrammarState, "look", look)
        monkeypatch.setattr(engine.scheduler, "step", step)


def ask(engine: Engine, grammar: Grammar, tenant: str) -> Any:
    params = SamplingParams(grammar=grammar, max_new_tokens=60, temperature=1.0, seed=1)
    return engine.submit(PROMPT, params, tenant=tenant)


@pytest.mark.parametrize("first_s", [HOSTILE_S, 0.0])
def test_hostile_grammars_keep_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch, first_s: float) -> None:
    """Each step once had all of their looks, under the lock that others need to hand in requests."""
    looks = Looks(engine, monkeypatch, first_s)
    with engine.held():
        hostile = [ask(engine, HOSTILE, "mallory") for _ in range(12)]
        other = ask(engine, ORDINARY, "ann")
    assert set(other.result().text) <= set("cd")
    for each in hostile:
        assert set(each.result().text) <= set("ab")
    assert looks.num_locked == 0
    shared = [count for count, is_shared in zip(looks.by_step, looks.is_shared, strict=True) if is_shared]
    assert 1 <= max(shared) <= 3
    assert sum(looks.by_step) >= 12 * 30


def test_who_is_alone_is_not_slowed_down(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(engine, monkeypatch)
    for each in [ask(engine, HOSTILE, "mallory") for _ in range(8)]:
        assert each.result().finish_reason == "stop"
    assert max(looks.by_step) == 8
