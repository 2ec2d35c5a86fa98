"""Trials: what every job begins with, what they hold, and what those hear who wait for one."""

from __future__ import annotations

import logging
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from kvcomm.align.ladder import Rung
from kvcomm.engine.engine import Engine
from kvcomm.errors import EngineClosed, PoolExhausted, WeightsChanged
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.idle_work import Steps, Urgency
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION, Case, Exact, Replayer
from kvcomm.reuse.trials import Trial
from tests.engine.conftest import greedy, some_tokens, stock_logits
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, ask, prompt, tokens_of
from tests.tiny import TinyModel, tiny_model

EXACT = ReusePolicy.exact()


def promise(
    engine: Engine, make: object, seed: int = 1, role: tuple[int, ...] = ROLE_B, policy: ReusePolicy = EXACT
) -> Future[object]:
    """Let steps be done on a prompt beside requests."""
    segments = engine.read_prompt(prompt(role, seed), is_start=True)
    weights = engine.live.now(closely=True)
    return engine.reuse.parts.trials.promise(engine.namespace(), weights, segments, make, policy)  # type: ignore[arg-type]


def exact_case_of(engine: Engine, guess: tuple[int, ...], *, with_moves: bool) -> tuple[Case, Exact] | None:
    """The exact case of a prompt, from a guess at its answer."""

    def steps(trial: Trial) -> Generator[None, None, tuple[Case, Exact] | None]:
        yield from engine.reuse.parts.trials.complete(trial)
        trial.guess = guess
        if not with_moves:
            with engine.lock:
                engine.reuse.parts.planner.finder.release(trial.moves)
                trial.moves = []
        return (yield from engine.reuse.parts.trials.exact_case(trial))

    return promise(engine, steps).result(PATIENCE_S)  # type: ignore[return-value]


def guesses(answer: list[int]) -> dict[str, tuple[int, ...]]:
    """Guesses at an answer, right in one way or another."""
    wrong = 3 if answer[7] != 3 else 4
    return {
        "none": (),
        "right": tuple(answer),
        "too long": (*answer, 5, 6, 7),
        "too short": tuple(answer[:9]),
        "wrong in the middle": (*answer[:7], wrong, *answer[8:]),
        "wrong at once": (wrong if answer[0] != wrong else wrong + 1, *answer[1:]),
        "one token": tuple(answer[:1]),
        "wrong at the end": (*answer[:-1], wrong if answer[-1] != wrong else wrong + 1),
    }


@pytest.mark.parametrize("with_moves", [False, True])
@pytest.mark.parametrize("kind", guesses(list(range(100, 132))))
def test_whatever_is_guessed_the_case_is_the_greedy_answer(learning: Engine, kind: str, with_moves: bool) -> None:
    """One pass tells how far a guess is right, and what is left is decoded: as if nobody had guessed."""
    tokens = tokens_of(prompt(ROLE_B, 1))
    answer = greedy(learning.model, tokens, NUM_CONTINUATION)
    ends = learning.reuse.parts.trials._ends
    assert not ends & set(answer), "choose another seed: this prompt's answer ends early"
    ask(learning, ROLE_A, 1, EXACT)
    found = exact_case_of(learning, guesses(answer)[kind], with_moves=with_moves)
    assert found is not None
    case, exact = found
    assert list(case.continuation) == answer
    assert len(case.moves) == with_moves
    logits = stock_logits(learning.model, [*tokens, *answer[:-1]])[-NUM_CONTINUATION:]
    torch.testing.assert_close(exact.log_probs, logits.log_softmax(-1), atol=1e-4, rtol=0)
    assert (exact.attended is not None) is with_moves
    again = exact_case_of(learning, (), with_moves=with_moves)
    assert again is not None
    if exact.attended is not None and again[1].attended is not None:
        torch.testing.assert_close(exact.attended, again[1].attended, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("num_guessed", [0, 1, 3, 5, 9])
def test_answers_that_end(shared_model: TinyModel, num_tokens: int, num_guessed: int) -> None:
    """At a token that ends answers: what is guessed behind it counts for nothing, and nothing at all is no case."""
    with Engine(shared_model.model, shared_model.tokenizer) as engine:
        tokens = tokens_of(prompt(ROLE_B, 1))
        answer = greedy(engine.model, tokens, 12)
        first = [index for index, token in enumerate(answer) if token not in answer[:index]]
        place = next(index for index in first if index >= num_tokens)
        engine.reuse.parts.trials._ends = frozenset({answer[place]})
        found = exact_case_of(engine, tuple(answer[:num_guessed]), with_moves=False)
        assert (None if found is None else list(found[0].continuation)) == (answer[:place] or None)
        engine.check_integrity()


def test_a_trial_shares_what_the_tree_has_and_gives_everything_back(learning: Engine) -> None:
    ask(learning, ROLE_A, 1, EXACT)
    ask(learning, ROLE_B, 1, EXACT)
    seen: list[tuple[int, int]] = []

    def steps(trial: Trial) -> Generator[None, None, None]:
        with learning.lock:
            learning.reuse.parts.trials.share(trial, trial.sequence, trial.num_prompt)
        seen.append((trial.sequence.num_computed, len(trial.moves)))
        learning.check_integrity()
        yield
        yield from learning.reuse.parts.trials.prefill(trial.sequence)
        with learning.lock:
            trial.moves = learning.reuse.parts.trials.find(trial, 0)
        seen.append((trial.sequence.num_computed, len(trial.moves)))
        learning.check_integrity()
        yield

    promise(learning, steps).result(PATIENCE_S)
    num_prompt = len(tokens_of(prompt(ROLE_B, 1)))
    assert seen == [(num_prompt // 16 * 16, 0), (num_prompt, 1)] or seen == [(num_prompt, 0), (num_prompt, 1)]
    learning.check_integrity()
    learning.cache.clear()
    assert learning.cache.stats().num_free == learning.pool.num_pages


def test_errors_reach_whoever_waits_and_nobody_else(learning: Engine, caplog: pytest.LogCaptureFixture) -> None:
    class Injected(Exception):
        pass

    def fails(trial: Trial) -> Generator[None, None, None]:
        yield
        raise Injected

    caplog.set_level(logging.DEBUG, "kvcomm.study")
    first, second = promise(learning, fails), learning.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")])
    with pytest.raises(Injected):
        first.result(PATIENCE_S)
    assert second.result(PATIENCE_S) == []
    assert [record.message for record in caplog.records if record.name == "kvcomm.study"] == ["idle work failed"]


def test_a_waiting_job_whose_weights_are_gone_says_so() -> None:
    """Bug: whoever waited was told that the engine had been closed."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        with engine.lock, engine.held():
            future = engine.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")])
            with torch.no_grad():
                tiny.model.lm_head.weight.mul_(2.0)
        with pytest.raises(WeightsChanged):
            future.result(PATIENCE_S)
        assert engine.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")]).result(PATIENCE_S) == []


def test_a_pool_that_is_full_ends_the_job_with_that_error(shared_model: TinyModel) -> None:
    config = replace(Engine(shared_model.model, shared_model.tokenizer).config, pool_tokens=160)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        with engine.context(some_tokens(100)), pytest.raises(PoolExhausted):
            engine.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")]).result(PATIENCE_S)
        assert engine.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")]).result(PATIENCE_S) == []
        engine.check_integrity()


def test_whoever_gives_up_waiting_harms_nobody(learning: Engine) -> None:
    with learning.held():
        future = learning.reuse.measure(prompt(ROLE_B, 1), [5], [Rung("rotate")])
        other = learning.reuse.measure(prompt(ROLE_B, 2), [5], [Rung("rotate")])
        assert future.cancel()
    assert other.result(PATIENCE_S) == []
    learning.check_integrity()


def test_the_end_is_told_to_all_who_wait(shared_model: TinyModel) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer)
    with engine.held():
        futures = [engine.reuse.measure(prompt(ROLE_B, seed), [5], [Rung("rotate")]) for seed in range(3)]
        with engine.lock:
            engine.reuse.parts.idle.close()
    for future in futures:
        with pytest.raises(EngineClosed):
            future.result(PATIENCE_S)
    with pytest.raises(EngineClosed):
        engine.reuse.measure(prompt(ROLE_B, 9), [5], [Rung("rotate")]).result(PATIENCE_S)
    engine.close()


def test_what_a_dropped_study_holds_comes_back_in_the_middle_of_it(learning: Engine) -> None:
    ask(learning, ROLE_A, 1, LOOSE)
    assert learning.wait_idle(PATIENCE_S)
    free = learning.pool.num_free
    reached: list[int] = []

    def steps(trial: Trial) -> Steps:
        trials = learning.reuse.parts.trials
        yield from trials.complete(trial)
        assert len(trial.moves) == 1
        scratch = KVSequence(learning.pool, tokens_of(prompt(ROLE_B, 1)))
        with trials.replayer.borrowed(scratch, trial.sequence, 40, 8):
            reached.append(1)
            yield
            reached.append(2)
            yield

    with learning.held():
        segments = learning.read_prompt(prompt(ROLE_B, 1), is_start=True)
        tokens = tokens_of(prompt(ROLE_B, 1))
        weights = learning.live.now(closely=True)
        with learning.lock:
            trial = Trial(
                learning.namespace(), weights, segments, KVSequence(learning.pool, tokens), len(tokens), LOOSE
            )
            learning.reuse.parts.trials.queue(trial, steps(trial), Urgency.STUDY)
        idle = learning.reuse.parts.idle
        while not reached:
            idle.step()
        learning.check_integrity()
        assert learning.pool.num_free < free
        assert idle.give_way()
        assert learning.pool.num_free == free
        learning.check_integrity()
    assert reached == [1]


def test_replays_know_what_they_borrow(learning: Engine) -> None:
    assert isinstance(learning.reuse.parts.trials.replayer, Replayer)
    assert not list(learning.reuse.parts.replayer.pages_held())
