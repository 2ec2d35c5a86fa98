"""KV to and from transformers caches: stock `generate` goes on where kvcomm stopped, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, PreTrainedModel, StaticCache

from kvcomm.config import EngineConfig
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.errors import ContextBusy, ContextReleased, EmptyPrompt, InvalidRequest, PoolExhausted
from kvcomm.memory.fidelity import Fidelity
from tests.engine.conftest import greedy, some_tokens
from tests.tiny import TinyModel, tiny_tokenizer

NUM_NEW = 10
WINDOW = 16


@pytest.fixture(scope="module")
def windowed_model() -> TinyModel:
    """A random Mistral that sees 16 tokens back."""
    tokenizer = tiny_tokenizer()
    config = tf.MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        sliding_window=WINDOW,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyModel(tf.MistralForCausalLM(config).eval(), tokenizer)


@contextmanager
def engine_of(model: TinyModel) -> Iterator[Engine]:
    with Engine(model.model, model.tokenizer, config=EngineConfig(page_size=4, pool_tokens=1024)) as engine:
        yield engine
        engine.check_integrity()


def stock_continuation(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> list[int]:
    """Greedy tokens of stock `generate` behind the prompt, from a cache of its beginning."""
    prompt = torch.tensor([list(token_ids)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, len(token_ids) :]]


def stock_cache(model: PreTrainedModel, token_ids: Sequence[int], *, with_config: bool = True) -> DynamicCache:
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    with torch.no_grad():
        model(torch.tensor([list(token_ids)]), past_key_values=cache, use_cache=True)
    return cache


def continuation(context: Context) -> list[int]:
    return list(context.generate(max_new_tokens=NUM_NEW, ignore_eos=True).token_ids)


# -- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 63])
def test_stock_generate_continues_a_context(engine: Engine, num_tokens: int) -> None:
    token_ids = some_tokens(num_tokens + 2)
    with engine.context(token_ids[:num_tokens]) as context:
        cache = context.to_hf_cache(whole=True)
    assert cache.get_seq_length() == num_tokens
    expected = greedy(engine.model, token_ids, NUM_NEW)
    assert stock_continuation(engine.model, token_ids, cache) == expected


def test_stock_generate_continues_a_fork_behind_an_answer(engine: Engine) -> None:
    """Pages shared and scattered; the answer's last token has no KV yet, so stock code computes it."""
    root = engine.context(some_tokens(30))
    others = [root.fork().extend(some_tokens(7, seed=seed)) for seed in (1, 2, 3)]
    fork = others[1].fork()
    continuation(fork)
    cache, token_ids = fork.to_hf_cache(), fork.tokens
    assert cache.get_seq_length() == len(token_ids) - 1
    assert stock_continuation(engine.model, token_ids, cache) == greedy(engine.model, token_ids, NUM_NEW)


@pytest.mark.parametrize("is_answered", [False, True])
def test_stock_generate_gives_the_contexts_own_answer(engine: Engine, is_answered: bool) -> None:
    """With the whole cache stock code computes the prompt twice and says nothing: wrong in 28 of 35 cases."""
    for num_tokens in [*range(1, 20), 63, 64, 65]:
        with engine.context(some_tokens(num_tokens, seed=num_tokens)) as context:
            if is_answered:
                continuation(context)
            cache, token_ids = context.to_hf_cache(), context.tokens
            assert cache.get_seq_length() == len(token_ids) - 1
            assert stock_continuation(engine.model, token_ids, cache) == continuation(context)


def test_the_last_token_is_left_out_of_windows_too(windowed_model: TinyModel) -> None:
    for num_tokens in (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 50):
        with engine_of(windowed_model) as engine, engine.context(some_tokens(num_tokens)) as context:
            cache = context.to_hf_cache()
            assert stock_continuation(windowed_model.model, context.tokens, cache) == continuation(context)


def test_a_cache_is_whole_only_as_far_as_it_is_computed(engine: Engine) -> None:
    with engine.context(some_tokens(9)) as context:
        assert context.to_hf_cache(whole=True).get_seq_length() == 9
        continuation(context)
        assert context.to_hf_cache(whole=True).get_seq_length() == 9 + NUM_NEW - 1
        assert context.to_hf_cache().get_seq_length() == 9 + NUM_NEW - 1


def test_the_cache_is_a_copy(engine: Engine) -> None:
    token_ids = some_tokens(21)
    context = engine.context(token_ids)
    cache = context.to_hf_cache()
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
    assert continuation(context.fork()) == greedy(engine.model, token_ids, NUM_NEW)
    kept = context.to_hf_cache()
    context.release()
    for tensor in (*engine.pool.keys, *engine.pool.values):
        tensor.fill_(torch.nan)
    engine.cache.clear()
    longer = [*token_ids, 77]
    assert stock_continuation(engine.model, longer, kept) == greedy(engine.model, longer, NUM_NEW)


def test_released_and_busy_contexts_have_no_cache(engine: Engine) -> None:
    context = engine.context(some_tokens(9))
    handle = context.submit(max_new_tokens=100, ignore_eos=True)
    if not handle.done:
        with pytest.raises(ContextBusy):
            context.to_hf_cache()
    handle.result()
    context.release()
    with pytest.raises(ContextReleased):
        context.to_hf_cache()


@pytest.mark.parametrize("num_tokens", [WINDOW - 1, WINDOW, WINDOW + 1, 50])
def test_a_cache_of_a_windowed_model_keeps_what_is_still_seen(windowed_model: TinyModel, num_tokens: int) -> None:
    token_ids = some_tokens(num_tokens + 1)
    with engine_of(windowed_model) as engine, engine.context(token_ids[:-1]) as context:
        cache = context.to_hf_cache(whole=True)
    assert cache.get_seq_length() == num_tokens
    assert cache.layers[0].keys.shape[2] == min(num_tokens, WINDOW - 1)
    expected = greedy(windowed_model.model, token_ids, NUM_NEW)
    assert stock_continuation(windowed_model.model, token_ids, cache) == expected


@pytest.fixture(scope="module")
def sharing_model() -> TinyModel:
    """A random Gemma 3n whose last two layers use the KV of the first two."""
    tokenizer = tiny_tokenizer()
    config = tf.Gemma3nTextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyModel(tf.AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def test_layers_that_share_kv_go_out_once(sharing_model: TinyModel) -> None:
    """Bug: transformers keeps no KV for layers that use another's, and refused to be given any."""
    token_ids = some_tokens(30)
    with engine_of(sharing_model) as engine, engine.context(token_ids[:-1]) as context:
        cache = context.to_hf_cache()
        with pytest.raises(InvalidRequest, match="keys of layer 0 are"):
            engine.context_from_hf_cache(context.to_hf_cache(), token_ids)
    expected = greedy(sharing_model.model, token_ids, NUM_NEW)
    assert stock_continuation(sharing_model.model, token_ids, cache) == expected


# -- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cached", [1, 4, 20, 29, 30])
def test_a_context_continues_a_stock_cache(engine: Engine, num_cached: int) -> None:
    """Tokens behind the cache are computed on the first use; all or just the last may be missing."""
    token_ids = some_tokens(30)
    context = engine.context_from_hf_cache(stock_cache(engine.model, token_ids[:num_cached]), token_ids)
    assert (context.tokens, context.num_tokens) == (tuple(token_ids), 30)
    expected = greedy(engine.model, token_ids, NUM_NEW)
    assert continuation(context.fork()) == expected
    context.extend(some_tokens(5, seed=1))
    assert continuation(context) == greedy(engine.model, token_ids + some_tokens(5, seed=1), NUM_NEW)


def test_there_and_back(engine: Engine) -> None:
    token_ids = some_tokens(45)
    there = engine.context(token_ids)
    back = engine.context_from_hf_cache(there.to_hf_cache(), token_ids, name="back")
    for first, second in zip(there.to_hf_cache().layers, back.to_hf_cache().layers, strict=True):
        assert torch.equal(first.keys, second.keys)
        assert torch.equal(first.values, second.values)
    assert (back.name, there.fidelity, back.fidelity) == ("back", Fidelity.EXACT, Fidelity.APPROXIMATE)
    assert continuation(back) == continuation(there)


def test_the_cache_that_came_in_is_not_touched(engine: Engine) -> None:
    token_ids = some_tokens(20)
    cache = stock_cache(engine.model, token_ids)
    before = [layer.keys.clone() for layer in cache.layers]
    continuation(engine.context_from_hf_cache(cache, token_ids))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_a_windowed_cache_comes_in_while_it_is_whole(windowed_model: TinyModel) -> None:
    token_ids = some_tokens(40)
    model = windowed_model.model
    with engine_of(windowed_model) as engine:
        early = engine.context_from_hf_cache(stock_cache(model, token_ids[: WINDOW - 1]), token_ids)
        assert continuation(early) == greedy(model, token_ids, NUM_NEW)
        # Without a config, transformers keeps every token of every layer.
        kept = engine.context_from_hf_cache(stock_cache(model, token_ids, with_config=False), token_ids)
        assert continuation(kept) == greedy(model, token_ids, NUM_NEW)
        for num_cached in (WINDOW, 40):
            with pytest.raises(InvalidRequest, match="sliding window drops early tokens: import the cache before"):
                engine.context_from_hf_cache(stock_cache(model, token_ids[:num_cached]), token_ids)


def spoiled(cache: DynamicCache) -> DynamicCache:
    for layer in cache.layers:
        layer.values.mul_(-3)
    return cache


@pytest.mark.parametrize("num_cached", [12, 39, 40])
def test_foreign_kv_never_serves_anybody_else(engine: Engine, tmp_path: Path, num_cached: int) -> None:
    """Law 2. The KV is wrong on purpose; whatever is done with its context, cold requests must not notice."""
    token_ids = some_tokens(40)
    context = engine.context_from_hf_cache(spoiled(stock_cache(engine.model, token_ids[:num_cached])), token_ids)
    wrong = continuation(context.fork())
    assert wrong != greedy(engine.model, token_ids, NUM_NEW)
    answers = context.fork().generate(max_new_tokens=9, n=3, temperature=1.0, seed=1, ignore_eos=True)
    assert len(answers.choices) == 3
    longer = context.fork().extend(some_tokens(9, seed=4))
    file = context.save(tmp_path / "spoiled")
    restored = engine.restore(file)
    assert continuation(restored) == wrong
    continuation(context)
    contexts = [context, longer, longer.fork(), restored]
    assert {kept.fidelity for kept in contexts} == {Fidelity.APPROXIMATE}
    assert engine.cache.stats().num_cached == 0
    for kept in contexts:
        kept.release()
    assert engine.cache.stats().num_cached == 0
    completion = engine.generate(token_ids, max_new_tokens=NUM_NEW, ignore_eos=True)
    assert list(completion.token_ids) == greedy(engine.model, token_ids, NUM_NEW)
    assert (completion.usage.exact_tokens, completion.usage.computed_tokens) == (0, 40)


def test_an_approximate_context_does_not_take_from_the_cache_either(engine: Engine) -> None:
    """Its continuation belongs to its own KV: exact pages of the same tokens must not be mixed in."""
    token_ids = some_tokens(40)
    cache = spoiled(stock_cache(engine.model, token_ids[:20]))
    before = continuation(engine.context_from_hf_cache(cache, token_ids))
    engine.generate(token_ids, max_new_tokens=1)
    assert engine.cache.stats().num_cached > 0
    assert continuation(engine.context_from_hf_cache(cache, token_ids)) == before


def two_sequences(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([some_tokens(8), some_tokens(8)]), past_key_values=cache, use_cache=True)
    return cache


def half_precision(model: PreTrainedModel) -> DynamicCache:
    cache = stock_cache(model, some_tokens(8))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    return cache


def one_layer_less(model: PreTrainedModel) -> DynamicCache:
    cache = stock_cache(model, some_tokens(8))
    del cache.layers[-1]
    return cache


def other_heads(model: PreTrainedModel) -> DynamicCache:
    cache = stock_cache(model, some_tokens(8))
    cache.layers[1].values = cache.layers[1].values[:, :1]
    return cache


def layers_of_different_length(model: PreTrainedModel) -> DynamicCache:
    cache = stock_cache(model, some_tokens(8))
    cache.layers[1].keys = cache.layers[1].keys[:, :, 1:]
    return cache


def static(model: PreTrainedModel) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor([some_tokens(8)]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: DynamicCache(), "the cache holds 0 tokens, the prompt has 10"),
        (lambda model: DynamicCache(config=model.config), "the cache holds 0 tokens, the prompt has 10"),
        (lambda model: stock_cache(model, some_tokens(11)), "the cache holds 11 tokens, the prompt has 10"),
        (two_sequences, r"keys of layer 0 are \(2, 2, 8, 8\) torch.float32, wanted \(1, 2, 8, 8\)"),
        (half_precision, r"torch.bfloat16, wanted \(1, 2, 8, 8\) torch.float32"),
        (one_layer_less, "the cache has 1 layers, the model 2"),
        (other_heads, r"values of layer 1 are \(1, 1, 8, 8\) torch.float32, wanted \(1, 2, 8, 8\)"),
        (layers_of_different_length, r"keys of layer 1 are \(1, 2, 7, 8\)"),
        (static, r"keys of layer 0 are \(1, 2, 16, 8\)"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    engine: Engine, make: Callable[[PreTrainedModel], DynamicCache], message: str
) -> None:
    num_free = engine.pool.num_free
    with pytest.raises(InvalidRequest, match=message):
        engine.context_from_hf_cache(make(engine.model), some_tokens(10))
    assert (engine.pool.num_free, engine.contexts) == (num_free, ())


def test_prompts_and_pool_are_checked_as_anywhere_else(engine: Engine) -> None:
    cache = stock_cache(engine.model, some_tokens(8))
    with pytest.raises(EmptyPrompt):
        engine.context_from_hf_cache(cache, [])
    hoard = engine.context(some_tokens(400))
    rest = [engine.context(some_tokens(100 + index, seed=index)) for index in range(5)]
    with pytest.raises(PoolExhausted):
        engine.context_from_hf_cache(stock_cache(engine.model, some_tokens(300)), some_tokens(300))
    assert engine.contexts == (hoard, *rest)
