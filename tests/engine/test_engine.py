"""The engine from outside: exactness whatever is cached, batched or forked, and every kind of bad input."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.passes import finite_rows
from kvcomm.engine.results import Chunk
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import (
    EmptyPrompt,
    EngineClosed,
    InvalidRequest,
    NumericalError,
    PoolExhausted,
    PoolTooSmall,
    PromptTooLong,
    RequestCancelled,
    UnknownToken,
)
from kvcomm.memory.segments import Segment
from tests.engine.conftest import greedy, some_tokens, stock_logits
from tests.limits import PATIENCE_S
from tests.stalling import stalling
from tests.stored import cached_by
from tests.tiny import TinyModel, tiny_model

NO_EOS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def test_greedy_output_equals_the_stock_forward(engine: Engine, shared_model: TinyModel) -> None:
    prompt = some_tokens(75)
    completion = engine.generate(prompt, NO_EOS)
    assert list(completion.token_ids) == greedy(shared_model.model, prompt, 12)
    assert completion.finish_reason == "length"


def test_second_request_reuses_and_answers_the_same(engine: Engine) -> None:
    prompt = some_tokens(75)
    cold, warm = engine.generate(prompt, NO_EOS), engine.generate(prompt, NO_EOS)
    assert cold.token_ids == warm.token_ids
    assert (cold.usage.exact_tokens, cold.usage.computed_tokens) == (0, 75)
    assert (warm.usage.exact_tokens, warm.usage.computed_tokens) == (74, 1)
    assert (cold.usage.reasons, warm.usage.reasons) == ({"new": 75}, {"last_token": 1})


def test_logits_behind_a_cached_prefix_equal_a_cold_run(engine: Engine, shared_model: TinyModel) -> None:
    shared, tail = some_tokens(61), some_tokens(30, seed=1)
    engine.generate(shared + some_tokens(9, seed=2), NO_EOS)
    completion = engine.generate(shared + tail, max_new_tokens=1, logprobs=20)
    assert completion.usage.exact_tokens == 61
    expected = stock_logits(shared_model.model, shared + tail)[-1].log_softmax(-1)
    assert completion.logprobs is not None
    for token_id, logprob in completion.logprobs[0].top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-4)


def test_everything_at_once_equals_one_by_one(engine: Engine, shared_model: TinyModel) -> None:
    prompts = [some_tokens(20) + some_tokens(10 + 7 * i, seed=i) for i in range(8)]
    handles = [engine.submit(prompt, NO_EOS) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert list(handle.result().token_ids) == greedy(shared_model.model, prompt, 12)


def test_requests_with_the_same_prefix_at_once_compute_it_once(engine: Engine) -> None:
    shared = some_tokens(80)
    handles = [engine.submit(shared + some_tokens(5, seed=i), NO_EOS) for i in range(1, 5)]
    computed = [handle.result().usage.computed_tokens for handle in handles]
    assert computed == [85, 5, 5, 5]


def test_seeded_sampling_does_not_depend_on_cache_or_batch(engine: Engine) -> None:
    prompt = some_tokens(40)
    sampling = SamplingParams(max_new_tokens=16, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)
    alone = engine.generate(prompt, sampling).token_ids
    others = [engine.submit(some_tokens(30, seed=i), NO_EOS) for i in range(5)]
    crowded = engine.generate(prompt, sampling).token_ids
    assert alone == crowded
    for other in others:
        other.result()
    assert engine.generate(prompt, seed=8, temperature=0.9, max_new_tokens=16).token_ids != alone


def test_choices_share_the_prompt_and_differ(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, n=4, ignore_eos=True)
    completion = engine.generate(some_tokens(50), sampling)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in completion.choices}) == 4
    assert completion.usage.computed_tokens == 50
    single = engine.generate(
        some_tokens(50), SamplingParams(max_new_tokens=10, temperature=1.0, seed=5, ignore_eos=True)
    )
    assert completion.choices[2].token_ids == single.token_ids


def test_tenants_do_not_share(engine: Engine) -> None:
    prompt = some_tokens(40)
    engine.generate(prompt, NO_EOS, tenant="a")
    assert engine.generate(prompt, NO_EOS, tenant="b").usage.exact_tokens == 0
    assert engine.namespace("a") != engine.namespace("b")
    assert (engine.cache.num_cached(prompt, tenant="a"), engine.cache.num_cached(prompt, tenant="c")) == (40, 0)


def test_cache_off_reuses_nothing(shared_model: TinyModel) -> None:
    with Engine(
        shared_model.model, shared_model.tokenizer, config=EngineConfig(pool_tokens=512, cache=False)
    ) as engine:
        for _ in range(2):
            usage = engine.generate(some_tokens(40), NO_EOS).usage
            assert (usage.exact_tokens, usage.reasons) == (0, {"cache_off": 40})
        assert engine.cache.stats().num_free == engine.pool.num_pages


def test_a_request_that_does_not_read_the_cache_still_fills_it(engine: Engine) -> None:
    first = engine.generate(some_tokens(40), NO_EOS)
    again = engine.generate(some_tokens(40), NO_EOS, reads_cache=False)
    assert (again.usage.exact_tokens, again.usage.reasons) == (0, {"cache_off": 40})
    assert again.token_ids == first.token_ids
    fresh = some_tokens(40, seed=1)
    engine.generate(fresh, NO_EOS, reads_cache=False)
    assert engine.generate(fresh, NO_EOS).usage.computed_tokens == 1
    engine.check_integrity()


def test_eviction_is_named_and_harmless(shared_model: TinyModel) -> None:
    config = EngineConfig(page_size=4, pool_tokens=128)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        prompt = some_tokens(60)
        first = engine.generate(prompt, NO_EOS)
        for seed in range(1, 4):
            engine.generate(some_tokens(60, seed=seed), NO_EOS)
        again = engine.generate(prompt, NO_EOS)
        assert again.token_ids == first.token_ids
        assert again.usage.reasons == {"evicted": again.usage.computed_tokens}
        engine.check_integrity()


def test_pinned_prefix_survives_and_quota_limits(shared_model: TinyModel) -> None:
    config = EngineConfig(page_size=4, pool_tokens=160)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        prompt = some_tokens(40)
        engine.generate(prompt, NO_EOS)
        assert engine.cache.pin(prompt) == 40
        for seed in range(1, 5):
            engine.generate(some_tokens(60, seed=seed), NO_EOS)
        assert engine.cache.num_cached(prompt) == 40
        assert engine.cache.unpin(prompt) == 40
        engine.cache.set_quota(cached_tokens=20)
        engine.generate(some_tokens(60, seed=9), NO_EOS)
        assert cached_by(engine, engine.namespace()).num_pages <= 5


def test_more_requests_than_pages_queue_and_finish(shared_model: TinyModel) -> None:
    config = EngineConfig(page_size=4, pool_tokens=120)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        prompts = [some_tokens(50, seed=i) for i in range(6)]
        handles = [engine.submit(prompt, NO_EOS) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            assert list(handle.result(PATIENCE_S).token_ids) == greedy(shared_model.model, prompt, 12)
        engine.check_integrity()


def test_stop_string_ends_text_and_tokens(engine: Engine) -> None:
    prompt = some_tokens(30)
    whole = engine.generate(prompt, NO_EOS)
    stop = whole.text[3:6]
    stopped = engine.generate(prompt, max_new_tokens=12, ignore_eos=True, stop=(stop,))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert stopped.text.startswith(engine.texts.decode(stopped.token_ids))


def test_stop_token_is_not_part_of_the_answer(engine: Engine) -> None:
    prompt = some_tokens(30)
    tokens = engine.generate(prompt, NO_EOS).token_ids
    stopped = engine.generate(prompt, max_new_tokens=12, ignore_eos=True, stop_token_ids=(tokens[4],))
    assert stopped.token_ids == tokens[: tokens.index(tokens[4])]
    assert stopped.finish_reason == "stop"


def test_stream_adds_up_to_the_result(engine: Engine) -> None:
    handle = engine.submit(some_tokens(30), NO_EOS)
    chunks = list(handle)
    result = handle.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_async_streams_run_at_once(engine: Engine) -> None:
    async def collect(seed: int) -> tuple[list[Chunk], tuple[int, ...]]:
        handle = engine.submit(some_tokens(30, seed=seed), NO_EOS)
        chunks = [chunk async for chunk in handle]
        return chunks, (await handle.aresult()).token_ids

    async def both() -> None:
        for chunks, token_ids in await asyncio.gather(collect(1), collect(2)):
            assert tuple(token for chunk in chunks for token in chunk.token_ids) == token_ids

    asyncio.run(both())


def test_leaving_a_stream_cancels_and_returns_pages(engine: Engine) -> None:
    with stalling(engine, after=20):
        handle = engine.submit(some_tokens(30), max_new_tokens=400, ignore_eos=True)
        for _ in handle:
            break
        assert handle.wait(PATIENCE_S)
    with pytest.raises(RequestCancelled, match=f"request {handle.request_id}"):
        handle.result()
    assert engine.cache.stats().num_in_requests == 0


def test_ctrl_c_while_waiting_cancels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with stalling(engine, after=20):
        handle = engine.submit(some_tokens(30), max_new_tokens=400, ignore_eos=True)
        with monkeypatch.context() as patched:
            patched.setattr(handle._changed, "wait_for", interrupt)
            with pytest.raises(KeyboardInterrupt):
                handle.result()
        assert handle.wait(PATIENCE_S)
    assert engine.cache.stats().num_in_requests == 0
    assert engine.generate(some_tokens(10), NO_EOS).usage.generated_tokens == 12


def test_result_times_out_and_goes_on(engine: Engine) -> None:
    with engine.lock:  # the engine cannot finish a step meanwhile
        handle = engine.submit(some_tokens(30), NO_EOS)
        with pytest.raises(TimeoutError, match="not finished after"):
            handle.result(0.01)
    assert handle.result().usage.generated_tokens == 12


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", EmptyPrompt, "no tokens"),
        ([], EmptyPrompt, "no tokens"),
        ([Segment(())], EmptyPrompt, "no tokens"),
        ([5, 100000], UnknownToken, "100000 is outside the vocabulary"),
        ([5, -1], UnknownToken, "-1 is outside"),
        ([5, "x"], InvalidRequest, "'x' is neither a token id nor a segment"),
        ([5, Segment((1,))], InvalidRequest, "not a mixture"),
        (None, InvalidRequest, "must be a text, a list of token ids or a list of segments, not None"),
        (5, InvalidRequest, "not 5"),
        (b"abc", InvalidRequest, "not b'abc'"),
        ({5: 6}, InvalidRequest, "not {5: 6}"),
        ({5, 6}, InvalidRequest, "not {5, 6}"),
        (np.array([[5, 6]]), InvalidRequest, "must be a text, a list"),
        (np.array([5.0]), InvalidRequest, "neither a token id nor a segment"),
        ([True, 5], InvalidRequest, "True is neither a token id"),
        ([5, None], InvalidRequest, "None is neither a token id"),
        ([[5]], InvalidRequest, "neither a token id"),
        ("half \ud83d of a pair", InvalidRequest, "lone surrogate"),
        ([Segment(("a",))], InvalidRequest, "'a' is neither a token id"),  # type: ignore[arg-type]
        ([Segment(5)], InvalidRequest, "must be a tuple of token ids, not 5"),  # type: ignore[arg-type]
        ([Segment((5,), name=7)], InvalidRequest, "name must be text, not 7"),  # type: ignore[arg-type]
        ([Segment((5,), name="\ud83d")], InvalidRequest, "lone surrogate"),
        ([10**30], UnknownToken, "outside the vocabulary"),
        ([7] * 501, PromptTooLong, "501 prompt tokens and up to 12 new ones exceed the model's limit of 512"),
    ],
)
def test_bad_prompts(engine: Engine, prompt: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.submit(prompt, NO_EOS)
    assert engine.generate([7] * 500, NO_EOS).usage.generated_tokens == 12


def test_prompts_of_numpy_and_torch(engine: Engine, shared_model: TinyModel) -> None:
    prompt = some_tokens(20)
    expected = greedy(shared_model.model, prompt, 12)
    for given in (np.array(prompt), torch.tensor(prompt), tuple(prompt), [Segment(np.array(prompt))]):  # type: ignore[arg-type]
        assert list(engine.generate(given, NO_EOS).token_ids) == expected  # type: ignore[arg-type]


def test_bad_settings_of_a_request(engine: Engine) -> None:
    for settings, message in (
        ({"tenant": None}, "the tenant must be text"),
        ({"tenant": "\ud83d"}, "lone surrogate"),
        ({"policy": "exact"}, "policy must be a ReusePolicy"),
        ({"sampling": 5}, "sampling must be a SamplingParams"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            engine.generate(some_tokens(5), **settings)  # type: ignore[arg-type]
    for limit in (-1, 2.5, "many", True):
        with pytest.raises(InvalidRequest, match="held_tokens must be"):
            engine.cache.set_quota(held_tokens=limit)  # type: ignore[arg-type]


def test_request_larger_than_the_pool(shared_model: TinyModel) -> None:
    with Engine(shared_model.model, shared_model.tokenizer, config=EngineConfig(page_size=4, pool_tokens=40)) as engine:
        with pytest.raises(PoolTooSmall, match="up to 42 tokens need 11 pages of 4; the whole pool has 10"):
            engine.submit(some_tokens(30), NO_EOS)
        assert engine.generate(some_tokens(28), NO_EOS).usage.generated_tokens == 12


def test_pool_held_by_contexts_is_said_and_recovers(shared_model: TinyModel) -> None:
    with Engine(shared_model.model, shared_model.tokenizer, config=EngineConfig(page_size=4, pool_tokens=80)) as engine:
        context = engine.context(some_tokens(60))
        with pytest.raises(PoolExhausted, match="held by contexts or pinned"):
            engine.generate(some_tokens(30, seed=1), NO_EOS)
        context.release()
        assert engine.generate(some_tokens(30, seed=1), NO_EOS).usage.generated_tokens == 12
        engine.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_not_finite_are_told_from_large_ones(dtype: torch.dtype) -> None:
    """Models hide tokens behind the least number of their dtype; two of them overflow a sum."""
    logits = torch.full((5, 100), 900.0, dtype=dtype)
    logits[1, 3], logits[2, 99], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    logits[4, 10:20] = torch.finfo(dtype).min
    assert finite_rows(logits) == [True, False, False, False, True]
    assert finite_rows(logits[:1]) == [True]


def test_nan_logits_fail_that_request_only() -> None:
    tiny = tiny_model()
    poison = 77
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[poison] = float("nan")
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=512)) as engine:
        clean = [token for token in some_tokens(40) if token != poison]
        alone = engine.generate(clean, NO_EOS).token_ids
        engine.cache.clear()
        handles = [engine.submit([*clean[:20], poison, *clean[20:]], NO_EOS), engine.submit(clean, NO_EOS)]
        with pytest.raises(NumericalError, match="NaN or infinite logits"):
            handles[0].result()
        assert handles[1].result().token_ids == alone
        assert engine.cache.num_cached([*clean[:20], poison]) <= 20
        engine.check_integrity()
        assert engine.generate(clean, NO_EOS).token_ids == alone


def test_an_exception_in_the_model_reaches_its_callers_only(
    engine: Engine, shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(shared_model.model.lm_head, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(some_tokens(30), NO_EOS)
    assert engine.generate(some_tokens(30), NO_EOS).usage.generated_tokens == 12


def test_close_fails_what_is_in_flight(shared_model: TinyModel) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer, config=EngineConfig(pool_tokens=1024))
    with stalling(engine, after=20):
        handle = engine.submit(some_tokens(30), max_new_tokens=400, ignore_eos=True)
        engine.close()
        engine.close()
    with pytest.raises(EngineClosed, match="create a new one"):
        handle.result()
    with pytest.raises(EngineClosed, match="create a new one"):
        engine.submit(some_tokens(3))


def test_an_internal_error_wakes_every_waiter(
    shared_model: TinyModel, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer, config=EngineConfig(pool_tokens=512))
    hook: Callable[..., object] = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)

    def broken() -> None:
        raise AssertionError("page 3 counted twice")

    monkeypatch.setattr(engine.scheduler._admission, "admit", broken)
    handle = engine.submit(some_tokens(5))
    with pytest.raises(EngineClosed, match="page 3 counted twice"):
        handle.result(PATIENCE_S)
    engine.close()
    assert hook is not threading.excepthook


def test_the_model_still_serves_stock_generate(engine: Engine, shared_model: TinyModel) -> None:
    prompt = some_tokens(30)
    engine.generate(prompt, NO_EOS)
    stock = shared_model.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 30), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert shared_model.model.config._attn_implementation == "sdpa"
    assert stock.shape == (1, 42)
