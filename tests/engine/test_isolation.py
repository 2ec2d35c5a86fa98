"""Whatever is raised on behalf of one request ends that request, with its pages returned; its neighbors go on.

Exceptions are injected at every place where code of one choice, or what one request brought along, runs in a step that
others share.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomm.config import EngineConfig
from kvcomm.engine import answers
from kvcomm.engine.admission import Admission
from kvcomm.engine.batches import Batches
from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.in_flight import InFlight
from kvcomm.engine.offers import Offers
from kvcomm.engine.passes import Work, compute
from kvcomm.engine.request import Request
from kvcomm.engine.sampler import Sampler
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import PoolExhausted, PoolTooSmall
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.runner import ModelRunner, Run, ScoreWatch
from kvcomm.reuse.learner import Learner
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import greedy, some_tokens, stock_logits
from tests.limits import PATIENCE_S
from tests.tiny import TinyModel

ANSWER = SamplingParams(max_new_tokens=10, ignore_eos=True)
VICTIM = SamplingParams(max_new_tokens=10, ignore_eos=True, n=3, logprobs=2, stop=("\x00never\x00",), seed=1)


class Injected(Exception):
    """What a test raises somewhere inside."""


@pytest.fixture
def neighbors(shared_model: TinyModel) -> list[tuple[list[int], list[int]]]:
    """Prompts and what the stock forward answers."""
    prompts = [some_tokens(num, seed=num) for num in (11, 30, 17)]
    return [(prompt, greedy(shared_model.model, prompt, 10)) for prompt in prompts]


def fail_for(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, at_call: int, only: Callable[..., bool]
) -> None:
    """Let the `at_call`-th call of a method that concerns the victim raise, and all others do as ever."""
    real, calls = getattr(owner, name), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if only(*args, **kwargs) and next(calls) == at_call:
            raise Injected(f"{name} number {at_call}")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def is_victims(request: Request) -> bool:
    return request.sampling.n == 3


PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "sampler": (Sampler, "sample", lambda self, *_: self._params.n == 3),
    "detokenizer": (Detokenizer, "push", lambda self, *_: bool(self._stop)),
    "end of text": (Detokenizer, "finish", lambda self: bool(self._stop)),
    "log-probabilities": (answers, "token_logprob", lambda *_: True),
    "a chunk": (Request, "publish", lambda self, *_: is_victims(self)),
    "the result": (Request, "completion", lambda self: is_victims(self)),
    "planning": (Admission, "_plan", lambda self, request: is_victims(request)),
    "publishing": (Offers, "publish", lambda self, request: is_victims(request)),
    "remembering": (Offers, "remember", lambda self, request, *_, **__: is_victims(request)),
    "a fork": (answers, "_fork", lambda request, *_: is_victims(request)),
    "guessing": (Batches, "_found", lambda self, request, *_: is_victims(request)),
    "writing to pages": (InFlight, "can_write", lambda self, request, *_: is_victims(request)),
    "waiting for a prefix": (Admission, "_is_prefix_in_flight", lambda self, request: is_victims(request)),
}


@pytest.mark.parametrize("at_call", [0, 1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_of_one_choice_ends_its_request_alone(
    place: str,
    at_call: int,
    engine: Engine,
    neighbors: Sequence[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, only = PLACES[place]
    fail_for(owner, name, monkeypatch, at_call=at_call, only=only)
    with engine.lock:  # all of them meet in the same steps
        before = [engine.submit(prompt, ANSWER) for prompt, _ in neighbors[:2]]
        victim = engine.submit(some_tokens(13, seed=9), VICTIM)
        after = [engine.submit(prompt, ANSWER) for prompt, _ in neighbors[2:]]
    given = [handle.result(PATIENCE_S).token_ids for handle in (*before, *after)]
    assert given == [tuple(expected) for _, expected in neighbors]
    with pytest.raises(Injected) if at_call == 0 else suppress(Injected):  # later calls may never come
        victim.result(PATIENCE_S)
    assert engine.generate(neighbors[0][0], ANSWER).token_ids == tuple(neighbors[0][1])


@pytest.mark.parametrize("place", ["sampler", "detokenizer", "the result", "planning", "publishing", "remembering"])
def test_a_context_is_as_before_when_its_request_fails(
    place: str, engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = some_tokens(18)
    context = engine.context(prompt)
    owner, name, _ = PLACES[place]
    with monkeypatch.context() as patch:
        fail_for(owner, name, patch, at_call=0, only=lambda *_, **__: True)
        with pytest.raises(Injected):
            context.generate(ANSWER)
    assert context.tokens == tuple(prompt)
    assert list(context.generate(ANSWER).token_ids) == greedy(shared_model.model, prompt, 10)
    context.release()


def test_what_cannot_be_learned_from_costs_no_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for(Learner, "after", monkeypatch, at_call=0, only=lambda *_: True)
    assert engine.generate(some_tokens(9), ANSWER).finish_reason == "length"


def test_a_pass_that_fails_is_computed_request_by_request(
    engine: Engine, neighbors: Sequence[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ModelRunner.forward
    poison = 7

    def failing(self: ModelRunner, runs: Sequence[Run], **kwargs: Any) -> Tensor:
        if any(poison in run.token_ids[:1] for run in runs):
            raise Injected("this prompt does not suit the model")
        return real(self, runs, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", failing)
    with engine.lock:
        good = [engine.submit(prompt, ANSWER) for prompt, _ in neighbors]
        bad = engine.submit([poison, *some_tokens(5)], ANSWER)
    with pytest.raises(Injected):
        bad.result(PATIENCE_S)
    assert [handle.result(PATIENCE_S).token_ids for handle in good] == [tuple(expected) for _, expected in neighbors]


@pytest.mark.parametrize("broken", [lambda logits: logits[:0], lambda logits: logits[0], lambda logits: logits.bool()])
def test_logits_that_are_none_end_requests_not_the_engine(
    broken: Callable[[Tensor], Tensor], engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, prompt = ModelRunner.forward, some_tokens(12)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", lambda self, runs, **kwargs: broken(real(self, runs, **kwargs)))
        with pytest.raises((ValueError, RuntimeError)):
            engine.generate(prompt, ANSWER)
    assert list(engine.generate(prompt, ANSWER).token_ids) == greedy(shared_model.model, prompt, 10)


class Looking:
    """An attempt of which only looking on is asked; it notes what it is told."""

    def __init__(self, at: str) -> None:
        self.at, self.errors = at, list[Exception]()

    def watch(self, run: Run, row: int) -> ScoreWatch | None:
        if self.at == "before":
            raise Injected("before looking on")

        def look(layer_id: int, query: Tensor, scale: float) -> None:
            if self.at == "meanwhile":
                raise Injected("while looking on")

        return look

    def spoil(self, error: Exception) -> None:
        self.errors.append(error)


@pytest.mark.parametrize("at", ["before", "meanwhile", "never"])
def test_who_looks_on_and_fails_is_told_once_and_the_pass_goes_on(at: str, engine: Engine) -> None:
    """What a request that moves nothing is given does not depend on who looks on beside it."""
    attempts = [Looking("never"), Looking(at), Looking("never")]
    prompts = [some_tokens(9, seed=seed) for seed in range(3)]
    batch, sequences = [], []
    for attempt, prompt in zip(attempts, prompts, strict=True):
        sequence = KVSequence(engine.pool, prompt)
        sequence.make_writable(0, 9)
        run = Run(sequence.token_ids, sequence.pages, 0, 1)
        request: Any = SimpleNamespace(attempt=attempt, weights=engine.live.now())
        batch.append(Work(request, None, sequence, (run,)))
        sequences.append(sequence)
    computed, failures = compute(engine.runner, batch)
    assert failures == []
    for found, prompt in zip(computed, prompts, strict=True):
        torch.testing.assert_close(found.logits[0], stock_logits(engine.model, prompt)[-1], atol=1e-4, rtol=0)
    assert [len(attempt.errors) for attempt in attempts] == [0, int(at != "never"), 0]
    for sequence in sequences:
        sequence.release()


def test_a_loop_that_is_closed_while_it_is_woken_harms_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be asked whether it is closed, which it could become before the next line."""
    woken = threading.Event()

    def closed(self: asyncio.AbstractEventLoop, *_: object, **__: object) -> None:
        woken.set()
        raise RuntimeError("Event loop is closed")

    async def abandon() -> RequestHandle:
        handle = engine.submit(some_tokens(20), max_new_tokens=60, ignore_eos=True)
        stream = aiter(handle)
        await anext(stream)
        monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", closed)
        abandoned.append(stream)
        return handle

    abandoned: list[object] = []
    loop = asyncio.new_event_loop()
    try:
        handle = loop.run_until_complete(abandon())
        assert len(handle.result(PATIENCE_S).token_ids) == 60
        assert woken.is_set()
    finally:
        monkeypatch.undo()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert engine.generate(some_tokens(20), ANSWER).finish_reason == "length"


def test_a_reader_who_cannot_be_woken_does_not_keep_others_waiting(engine: Engine) -> None:
    handle = engine.submit(some_tokens(20), ANSWER)
    handle._wakers.append(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert len(list(handle)[-1].token_ids) == 1
    assert engine.generate(some_tokens(20), ANSWER).finish_reason == "length"


@pytest.fixture
def narrow(shared_model: TinyModel) -> Iterator[Engine]:
    """32 pages of 8 tokens; nothing may be leaked at the end."""
    config = EngineConfig(page_size=8, pool_tokens=256, max_batch_tokens=48, prefill_chunk=8)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as made:
        yield made
        made.check_integrity()
        for context in made.contexts:
            context.release()
        made.cache.clear()
        assert made.cache.stats().num_free == made.pool.num_pages


def test_answers_of_no_tokens_leave_no_pages(narrow: Engine) -> None:
    """Further choices used to fork the prompt and to keep their pages for good."""
    for seed in range(10):
        completion = narrow.generate(some_tokens(20, seed=seed), max_new_tokens=0, n=3)
        assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("", "length")] * 3
    context = narrow.context(some_tokens(20))
    for _ in range(5):
        assert len(context.generate(max_new_tokens=0, n=3).choices) == 3
    context.release()
    narrow.cache.clear()
    assert narrow.cache.stats().num_free == 32


def test_requests_of_several_answers_wait_for_each_other(narrow: Engine, shared_model: TinyModel) -> None:
    """Four answers of 40 tokens behind 20 take 8 + 3 * 6 pages; two such requests do not fit 32 at once."""
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True, n=4)
    prompts = [some_tokens(20, seed=seed) for seed in range(3)]
    with narrow.lock:
        handles = [narrow.submit(prompt, sampling) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        expected = greedy(shared_model.model, prompt, 40)
        assert [list(choice.token_ids) for choice in handle.result(PATIENCE_S).choices] == [expected] * 4


def test_admission_counts_every_answer_to_the_page(shared_model: TinyModel) -> None:
    """The exact number of pages is enough, one less is refused at once: alone and behind a context."""
    sampling = SamplingParams(max_new_tokens=13, ignore_eos=True, n=3)
    for num_prompt, on_context in itertools.product(range(14, 21), (False, True)):
        whole = -(-(num_prompt + 13) // 4)
        needed = whole + 2 * (whole - num_prompt // 4) + (on_context and num_prompt % 4 > 0)
        prompt = some_tokens(num_prompt)
        for num_pages in (needed, needed - 1):
            config = EngineConfig(page_size=4, pool_tokens=4 * num_pages, max_batch_tokens=48)
            with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
                asked = engine.context(prompt) if on_context else None
                ask = engine.generate if asked is None else asked.generate
                given = (prompt, sampling) if asked is None else (sampling,)
                if num_pages < needed:
                    with pytest.raises(
                        PoolTooSmall, match=f"3 answers of up to {num_prompt + 13} tokens need {needed} "
                    ):
                        ask(*given)
                else:
                    assert len({choice.token_ids for choice in ask(*given).choices}) == 1
                engine.check_integrity()


def test_a_prompt_that_fills_the_pool_is_served_beside_a_cached_part_of_it(shared_model: TinyModel) -> None:
    """The page of which it shared a part was needed twice, and could not be evicted because the request held it."""
    config = EngineConfig(page_size=4, pool_tokens=40, max_batch_tokens=48)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        prompt = some_tokens(30)
        engine.generate(prompt[:18], max_new_tokens=0)
        completion = engine.generate(prompt, max_new_tokens=10, ignore_eos=True)
        assert list(completion.token_ids) == greedy(shared_model.model, prompt, 10)
        assert (completion.usage.exact_tokens, completion.usage.reasons) == (16, {"no_room": 14})


def test_waiting_evicts_nothing(narrow: Engine) -> None:
    """A request that has to wait used to drop the whole cache, others' prefixes too, without being admitted by it."""
    cached = some_tokens(80)
    narrow.generate(cached, max_new_tokens=0)
    contexts = [narrow.context(some_tokens(64, seed=1)), narrow.context(some_tokens(64, seed=2))]
    with pytest.raises(PoolExhausted, match="nothing is running that could return some"):
        narrow.generate(some_tokens(100, seed=3), max_new_tokens=50, tenant="other")
    assert narrow.cache.num_cached(cached) == 80
    for context in contexts:
        context.release()
    assert len(narrow.generate(some_tokens(100, seed=3), max_new_tokens=50, tenant="other").token_ids) > 0


def test_a_request_that_can_be_admitted_evicts_what_it_needs_and_no_more(narrow: Engine) -> None:
    old, young = some_tokens(80), some_tokens(80, seed=1)
    narrow.generate(old, max_new_tokens=0)
    narrow.generate(young, max_new_tokens=0)
    narrow.generate(some_tokens(100, seed=2), max_new_tokens=20, ignore_eos=True)
    assert narrow.cache.num_cached(young) == 80
    assert 0 < narrow.cache.num_cached(old) < 80


def test_the_cost_of_learning_is_not_paid_by_whoever_waits(shared_model: TinyModel) -> None:
    """A policy that learns, a pool that is too small for a trial: requests are served all the same."""
    policy = ReusePolicy(max_divergence=1.0, confidence=0.5)
    config = EngineConfig(page_size=4, pool_tokens=128, max_batch_tokens=48)
    with Engine(shared_model.model, shared_model.tokenizer, config=config, policy=policy) as engine:
        shared = engine.segment("three apples are left", name="shared")
        for head in ("one:", "two, three:", "four, five, six:"):
            assert engine.generate([engine.segment(head), shared], ANSWER).finish_reason == "length"
        engine.wait_idle(PATIENCE_S)
        engine.check_integrity()


def test_what_users_forget_makes_room_at_once(narrow: Engine) -> None:
    """Pages of forgotten contexts used to lie there until Python looked for cycles, or somebody made a context."""
    gc.disable()
    try:
        for seed in range(6):
            context = narrow.context(some_tokens(200, seed=seed))
            context.generate(max_new_tokens=2, ignore_eos=True)
            del context
            narrow.wait_idle(PATIENCE_S)
        prompt = some_tokens(240, seed=9)
        assert len(narrow.generate(prompt, max_new_tokens=4, ignore_eos=True, reads_cache=False).token_ids) == 4
    finally:
        gc.enable()
