"""Healing: so many tokens on moved KV, then exactly what the stock forward gives, and a context that equals a cold one.

The model is random, and what is moved is only turned: answers on it differ from exact ones at once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.context import PREFILL_ONLY, Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.grammar import Grammar
from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.guesses import MAX_MATCH, Found
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.request import Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.engine.spare import Spare
from kvcomm.errors import RequestCancelled
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.healing import NotHealed
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY, SMALL, greedy, some_tokens
from tests.limits import wait_for
from tests.stalling import stalling
from tests.stored import stored_by
from tests.tiny import TinyModel

ROTATE = Rung("rotate")
ROLE_A, ROLE_B, TAIL = (tuple(some_tokens(number, seed=number)) for number in (21, 34, 5))
TEXT = tuple(some_tokens(60, seed=30))
"""One on which answers differ by where exact KV begins."""
NUM_ANSWER = 12
SAMPLING = SamplingParams(max_new_tokens=NUM_ANSWER, ignore_eos=True)


def prompt(role: tuple[int, ...]) -> list[Segment]:
    return [Segment(role), Segment(TEXT, "question"), Segment(TAIL)]


TOKENS = [*ROLE_B, *TEXT, *TAIL]


def healing(within: int) -> ReusePolicy:
    return ReusePolicy(heal=True, heal_within=within)


def read_by_another(engine: Engine) -> None:
    """Let the text be known from another prompt."""
    engine.reuse.parts.cost.model = ROWS_ONLY  # measuring would take the pages of what is known
    engine.generate(prompt(ROLE_A), max_new_tokens=1)


def answer(engine: Engine, policy: ReusePolicy, sampling: SamplingParams = SAMPLING) -> Completion:
    """An answer on moved KV, of an engine that knows the text from another prompt and nothing else."""
    engine.cache.clear()
    read_by_another(engine)
    completion = engine.generate(prompt(ROLE_B), sampling, policy=policy, rung=ROTATE)
    assert completion.usage.aligned_tokens == len(TEXT)
    return completion


def moved_context(engine: Engine, policy: ReusePolicy) -> Context:
    """A context into which the text has been moved."""
    engine.cache.clear()
    read_by_another(engine)
    context = engine.empty_context(policy=policy)
    with engine.held():
        handle = context.submit(PREFILL_ONLY, prompt=prompt(ROLE_B))
        request_of(engine, handle).rung = ROTATE
    handle.result()
    assert context.fidelity is Fidelity.APPROXIMATE
    return context


def request_of(engine: Engine, handle: RequestHandle) -> Request:
    return next(request for request in engine.scheduler.requests() if request.handle is handle)


@pytest.fixture
def unhealed(engine: Engine, shared_model: TinyModel) -> list[int]:
    """The answer on moved KV, which is another one than the exact one from the first tokens on."""
    found = list(answer(engine, ReusePolicy.exact()).token_ids)
    assert found[:2] != greedy(shared_model.model, TOKENS, 2)
    return found


def expected(model: TinyModel, unhealed: list[int], within: int, num_tokens: int = NUM_ANSWER) -> list[int]:
    """So many tokens as on moved KV, and the stock forward's behind them."""
    begun = unhealed[: min(within, num_tokens)]
    return begun + greedy(model.model, [*TOKENS, *begun], num_tokens - len(begun))


def assert_cold(context: Context, engine: Engine) -> None:
    """A context's KV is a cold run's, as far as it is computed."""
    assert context.fidelity is Fidelity.EXACT
    with Engine(engine.model, engine.tokenizer, config=replace(SMALL, cache=False)) as other:
        cold = other.context(context.tokens).to_hf_cache()
        for mine, theirs in zip(context.to_hf_cache().layers, cold.layers, strict=True):
            num_tokens = mine.keys.shape[2]
            torch.testing.assert_close(mine.keys, theirs.keys[:, :, :num_tokens], rtol=0, atol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values[:, :, :num_tokens], rtol=0, atol=1e-4)


@pytest.mark.parametrize("within", [1, 2, 5, NUM_ANSWER - 1, NUM_ANSWER, NUM_ANSWER + 20])
def test_behind_so_many_tokens_the_answer_is_exact(
    engine: Engine, shared_model: TinyModel, unhealed: list[int], within: int
) -> None:
    completion = answer(engine, healing(within))
    assert list(completion.token_ids) == expected(shared_model, unhealed, within)
    assert completion.usage.healed_after == min(within, NUM_ANSWER)
    assert completion.usage.not_healed is None
    assert completion.usage.aligned_tokens == len(TEXT)  # that is how it was served


@pytest.mark.parametrize("num_rows", [0, 5, 16, 96])
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, draft_rows=0), replace(SMALL, max_batch_tokens=7)])
def test_an_answer_does_not_depend_on_how_busy_the_engine_is(
    shared_model: TinyModel, unhealed: list[int], num_rows: int, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spare, "num_rows", lambda *_: num_rows)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        read_by_another(engine)
        with engine.held():
            others = [engine.submit(some_tokens(9, seed=seed), max_new_tokens=20) for seed in range(3)]
            handle = engine.submit(prompt(ROLE_B), SAMPLING, policy=healing(4), rung=ROTATE)
        completion = handle.result()
        assert list(completion.token_ids) == expected(shared_model, unhealed, 4)
        assert completion.usage.healed_after == 4
        for seed, other in enumerate(others):
            assert list(other.result().token_ids) == greedy(shared_model.model, some_tokens(9, seed=seed), 20)
        engine.check_integrity()


def test_a_twin_is_computed_beside_answers_where_rows_are_spare(
    engine: Engine, shared_model: TinyModel, unhealed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows enough nothing but the last token is left for the step in which it takes over."""
    monkeypatch.setattr(Spare, "num_rows", lambda *_: 96)
    awaited, work = [], engine.scheduler._healing.awaited_work

    def watched(request: Request, budget: int) -> object:
        found = work(request, budget)
        awaited.append(found.num_tokens)
        return found

    monkeypatch.setattr(engine.scheduler._healing, "awaited_work", watched)
    assert list(answer(engine, healing(6)).token_ids) == expected(shared_model, unhealed, 6)
    assert awaited in ([1], [2])  # two where the last of its tokens were too few to be worth a run


def test_guesses_end_where_exact_kv_begins(
    engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is guessed right is drawn on moved KV, and so must not reach beyond."""
    whole = SamplingParams(max_new_tokens=40, ignore_eos=True)
    moved = answer(engine, ReusePolicy.exact(), whole).token_ids

    def knowing(token_ids: IntArray, num: int) -> Found:
        known = len(token_ids) - len(TOKENS)
        return Found(np.array(moved[known : known + num], dtype=np.int32), MAX_MATCH)

    monkeypatch.setattr(GuessGain, "row_cost", 0.01)  # not what the clock says
    monkeypatch.setattr("kvcomm.engine.batches.repeated", knowing)
    wanted = {within: expected(shared_model, list(moved), within, 40) for within in range(1, 30)}
    telling = [within for within in wanted if wanted[within][within] != moved[within]]  # the next guess is wrong there
    assert len(telling) >= 3
    for within in telling[:2] + telling[-2:]:
        healed = answer(engine, healing(within), whole)
        assert list(healed.token_ids) == wanted[within]
        assert healed.usage.guessed_tokens >= (within - 1) * 3 // 4


def test_a_context_is_a_cold_one_afterwards(engine: Engine, shared_model: TinyModel) -> None:
    with moved_context(engine, healing(3)) as context:
        context.generate(SAMPLING)
        assert_cold(context, engine)
        tokens = list(context.tokens)
        assert engine.cache.num_cached(tokens) >= (len(tokens) - 1) // SMALL.page_size * SMALL.page_size
        assert list(engine.generate(tokens, SAMPLING).token_ids) == greedy(shared_model.model, tokens, NUM_ANSWER)
        more = context.generate(SAMPLING)
        assert list(more.token_ids) == greedy(shared_model.model, tokens, NUM_ANSWER)
        assert more.usage.healed_after is None
        assert more.usage.aligned_tokens == 0
        engine.check_integrity()


def test_later_readers_find_exact_text(engine: Engine) -> None:
    """Its approximate renditions give way to exact ones, of the answer, too."""
    with moved_context(engine, healing(3)) as context:
        before = stored_by(engine)
        assert any(each.fidelity is Fidelity.APPROXIMATE for each in before)
        written = context.generate(SAMPLING)
        behind = stored_by(engine)
        assert all(each.fidelity is Fidelity.EXACT and each.risk == 0 for each in behind)
        digests = {Segment(ids).digest(engine.namespace()) for ids in (TEXT, written.token_ids)}
        own = {each.digest for each in behind if each.context is context.sequence.identity}
        assert own == digests


@pytest.mark.parametrize("within", [2, 30])
def test_a_stop_string_may_end_it_before_and_behind(engine: Engine, within: int) -> None:
    with moved_context(engine, healing(within)) as context:
        with context.fork() as fork:
            text = fork.generate(SAMPLING).text
        stopped = context.generate(replace(SAMPLING, stop=(text[5:8],)))
        assert stopped.finish_reason == "stop"
        assert context.tokens[len(TOKENS) :] == stopped.token_ids
        assert_cold(context, engine)
        engine.check_integrity()


def test_an_answer_that_ends_sooner_is_out_before_its_context_is_exact(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str | None, bool]] = []
    take_over = engine.scheduler._answers.let_take_over

    def watched(request: Request) -> None:
        seen.append((request.branches[0].finish_reason, request.handle.done))
        assert "".join(chunk.text for chunk in request.handle._chunks) == request.branches[0].detokenizer.text
        take_over(request)

    monkeypatch.setattr(engine.scheduler._answers, "let_take_over", watched)
    with moved_context(engine, healing(8)) as context:
        completion = context.generate(max_new_tokens=3, ignore_eos=True)
        assert seen == [("length", False)]
        assert completion.usage.healed_after == 3
        assert_cold(context, engine)


def test_an_empty_answer_leaves_no_logits_of_moved_kv(engine: Engine, shared_model: TinyModel) -> None:
    with moved_context(engine, healing(8)) as context:
        first = context.fork().generate(max_new_tokens=1, ignore_eos=True).token_ids
        empty = context.generate(SamplingParams(max_new_tokens=4, stop_token_ids=first))
        assert (empty.token_ids, empty.finish_reason) == ((), "stop")
        assert empty.usage.healed_after == 0
        assert context.ready_logits is None
        assert list(context.generate(SAMPLING).token_ids) == greedy(shared_model.model, TOKENS, NUM_ANSWER)
        assert_cold(context, engine)


@pytest.mark.parametrize("written", [1, 3, 7])
def test_who_is_cancelled_leaves_its_context_as_it_was(engine: Engine, shared_model: TinyModel, written: int) -> None:
    """Before exact KV takes over (at 5), and behind that: then with exact KV, and no logits of the other."""
    with moved_context(engine, healing(5)) as context:
        with stalling(engine, written=written) as go_on:
            handle = context.submit(max_new_tokens=60, ignore_eos=True)
            wait_for(lambda: sum(len(chunk.token_ids) for chunk in handle._chunks) >= written)
            handle.cancel()
            go_on.set()
            with pytest.raises(RequestCancelled):
                handle.result()
        assert list(context.tokens) == TOKENS
        if context.fidelity is Fidelity.EXACT:
            assert context.ready_logits is None
            assert list(context.generate(SAMPLING).token_ids) == greedy(shared_model.model, TOKENS, NUM_ANSWER)
        assert context.generate(SAMPLING).usage.aligned_tokens == 0 or written < 5
        engine.check_integrity()


def test_whoever_fails_does_so_alone(engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Request, budget: int) -> None:
        raise RuntimeError("no twin today")

    read_by_another(engine)
    monkeypatch.setattr(engine.scheduler._healing, "awaited_work", fail)
    with engine.held():
        other = engine.submit(some_tokens(9), max_new_tokens=20)
        handle = engine.submit(prompt(ROLE_B), SAMPLING, policy=healing(4), rung=ROTATE)
    with pytest.raises(RuntimeError, match="no twin today"):
        handle.result()
    assert list(other.result().token_ids) == greedy(shared_model.model, some_tokens(9), 20)
    engine.check_integrity()


def test_a_pool_that_holds_no_twin_serves_without(shared_model: TinyModel, unhealed: list[int]) -> None:
    config = replace(SMALL, pool_tokens=(len(TOKENS) + NUM_ANSWER + len(TEXT) + 8) // 4 * 4)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        completion = answer(engine, healing(4))
        assert list(completion.token_ids) == unhealed
        assert completion.usage.healed_after is None
        assert completion.usage.not_healed is NotHealed.NO_ROOM
        assert "not healed (no_room)" in repr(completion.usage)
        engine.check_integrity()


def test_a_quota_that_leaves_no_room_for_a_twin(engine: Engine, unhealed: list[int]) -> None:
    engine.cache.set_quota(held_tokens=len(TOKENS) + NUM_ANSWER + len(TEXT))
    completion = answer(engine, healing(4))
    assert list(completion.token_ids) == unhealed
    assert completion.usage.not_healed is NotHealed.QUOTA
    engine.cache.set_quota()
    assert answer(engine, healing(4)).usage.healed_after == 4


def test_a_twin_waits_for_room_that_others_return(shared_model: TinyModel, unhealed: list[int]) -> None:
    """Whether an answer is healed must not depend on who else is running."""
    config = replace(SMALL, pool_tokens=4 * len(TOKENS))
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        read_by_another(engine)
        with engine.held():
            other = engine.submit(some_tokens(2 * len(TOKENS)), max_new_tokens=20)
            handle = engine.submit(prompt(ROLE_B), SAMPLING, policy=healing(4), rung=ROTATE)
        other.result()
        completion = handle.result()
        if completion.usage.aligned_tokens:  # else the source had to give way
            assert list(completion.token_ids) == expected(shared_model, unhealed, 4)
        engine.check_integrity()


def test_several_answers_and_none_are_not_healed(engine: Engine) -> None:
    several = answer(engine, healing(3), replace(SAMPLING, n=2))
    assert several.usage.not_healed is NotHealed.SEVERAL_ANSWERS
    prefilled = answer(engine, healing(3), PREFILL_ONLY)
    assert prefilled.usage.not_healed is NotHealed.NO_ANSWER
    assert prefilled.usage.healed_after is None
    engine.cache.clear()
    exact = engine.generate(prompt(ROLE_B), SAMPLING, policy=healing(3))
    assert (exact.usage.healed_after, exact.usage.not_healed) == (None, None)  # nothing was moved


def test_a_fork_in_the_middle_keeps_what_its_parent_had(
    engine: Engine, shared_model: TinyModel, unhealed: list[int]
) -> None:
    with moved_context(engine, healing(5)) as context, stalling(engine, written=3) as go_on:
        handle = context.submit(SAMPLING)
        wait_for(lambda: sum(len(chunk.token_ids) for chunk in handle._chunks) >= 3)
        with context.fork() as child, context.fork() as other:
            assert child.fidelity is Fidelity.APPROXIMATE
            go_on.set()
            assert list(handle.result().token_ids) == expected(shared_model, unhealed, 5)
            assert_cold(context, engine)
            assert child.fidelity is Fidelity.APPROXIMATE
            other.policy = ReusePolicy.exact()
            assert list(other.generate(max_new_tokens=NUM_ANSWER - 3, ignore_eos=True).token_ids) == unhealed[3:]
            assert other.fidelity is Fidelity.APPROXIMATE
            healed = child.generate(max_new_tokens=NUM_ANSWER - 3, ignore_eos=True)
            assert list(healed.token_ids) == expected(shared_model, unhealed, 8)[3:]
            assert_cold(child, engine)
            engine.check_integrity()


def test_what_is_read_along_behind_moved_text_is_healed_with_it(engine: Engine, shared_model: TinyModel) -> None:
    with moved_context(engine, healing(3)) as context:
        producer = engine.submit(some_tokens(9), max_new_tokens=6, ignore_eos=True)
        answered = context.follow(producer).close(SAMPLING).result()
        followed = producer.result().token_ids
        tokens = [*TOKENS, *followed, *answered.token_ids]
        assert list(context.tokens) == tokens
        assert answered.usage.healed_after == 3
        begun = len(TOKENS) + 6 + 3
        assert list(answered.token_ids[3:]) == greedy(shared_model.model, tokens[:begun], NUM_ANSWER - 3)
        assert_cold(context, engine)
        engine.check_integrity()


@pytest.mark.parametrize("within", [1, 2, 6])
def test_what_a_grammar_forces_may_reach_beyond(engine: Engine, within: int) -> None:
    """Forced tokens come without logits: those behind the moved ones are computed exactly all the same."""
    grammar = Grammar.regex("(yes|no) three apples are left")
    with moved_context(engine, healing(within)) as context:
        completion = context.generate(max_new_tokens=60, grammar=grammar)
        assert completion.text in ("yes three apples are left", "no three apples are left")
        assert completion.usage.healed_after == within
        assert_cold(context, engine)
        engine.check_integrity()


def test_logprobs_are_those_of_the_kv_that_was_there(engine: Engine) -> None:
    wanted = replace(SAMPLING, logprobs=0)
    moved, healed = answer(engine, ReusePolicy.exact(), wanted), answer(engine, healing(4), wanted)
    tokens = [*TOKENS, *healed.token_ids]
    scored = engine.generate(tokens, max_new_tokens=0, prompt_logprobs=0).prompt_logprobs
    assert moved.logprobs is not None
    assert healed.logprobs is not None
    assert scored is not None
    for at, each in enumerate(healed.logprobs):
        truth = moved.logprobs[at] if at < 4 else scored[len(TOKENS) + at]
        assert truth is not None
        assert each.logprob == pytest.approx(truth.logprob, abs=1e-4)
