"""KV of other weights or adapters never serves a request; adapters are named by requests and take turns."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from kvcomm import Engine, EngineConfig
from kvcomm.errors import InvalidRequest, ModelLoadError, QuotaExceeded, SnapshotForeign, UnknownAdapter, WeightsChanged
from tests.lora import fill, greedy, save_lora, with_adapters
from tests.stored import cached_by
from tests.tiny import TinyModel, tiny_model

PROMPT = "Question: how many apples are left? "
NUM_TOKENS = 12
CONFIG = EngineConfig(page_size=4, pool_tokens=2048, prefill_chunk=8)


@pytest.fixture
def lora(tiny: TinyModel) -> PeftModel:
    return with_adapters(tiny.model, "first", "second")


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.model, tiny.tokenizer, config=CONFIG) as made:
        yield made
        made.wait_idle()
        made.check_integrity()


def answer(engine: Engine, prompt: str = PROMPT, *, adapter: str | None = None) -> list[int]:
    found = engine.generate(prompt, adapter=adapter, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    return list(found.token_ids)


def stock(tiny: TinyModel, prompt: str = PROMPT, num_tokens: int = NUM_TOKENS) -> list[int]:
    return greedy(tiny.model, tiny.tokenizer(prompt)["input_ids"], num_tokens)


def load_other_weights(model: LlamaForCausalLM) -> None:
    model.load_state_dict(tiny_model(seed=1).model.state_dict())


def write_through_data(model: LlamaForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def merge_a_lora(model: LlamaForCausalLM) -> None:
    with_adapters(model, "first").merge_and_unload()


def attach_a_lora(model: LlamaForCausalLM) -> None:
    with_adapters(model, "first")


def exchange_a_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[0] = tiny_model(seed=1).model.model.layers[0]


CHANGES = [load_other_weights, write_through_data, merge_a_lora, attach_a_lora, exchange_a_layer]


@pytest.mark.parametrize("change", CHANGES)
def test_kv_of_former_weights_is_not_found(
    change: Callable[[LlamaForCausalLM], None], engine: Engine, tiny: TinyModel
) -> None:
    """The cached prompt was served as exact, and the answer was wrong."""
    before = answer(engine)
    change(tiny.model)
    after = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)

    assert list(after.token_ids) == stock(tiny) != before
    assert after.usage.exact_tokens == 0
    assert engine.cache.num_cached(PROMPT) > 0


def test_kv_comes_back_with_the_weights(engine: Engine, tiny: TinyModel) -> None:
    former = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    before = answer(engine)
    load_other_weights(tiny.model)
    answer(engine)
    tiny.model.load_state_dict(former)

    assert engine.cache.num_cached(PROMPT) > 0
    assert answer(engine) == before


def test_what_is_chosen_by_hand_is_what_requests_without_a_name_mean(
    engine: Engine, tiny: TinyModel, lora: PeftModel
) -> None:
    for _ in range(2):
        for name in ("first", "second"):
            lora.set_adapter(name)
            assert answer(engine) == stock(tiny)
        with lora.disable_adapter():
            assert answer(engine) == stock(tiny) == stock(tiny_model())
    assert engine.cache.num_cached(PROMPT) == engine.cache.num_cached(PROMPT, adapter="first") > 0


def test_an_adapter_that_is_named_is_used_and_the_choice_by_hand_stays(
    engine: Engine, tiny: TinyModel, lora: PeftModel
) -> None:
    expected = {}
    for name in ("second", "first"):
        lora.set_adapter(name)
        expected[name] = stock(tiny)
    for name in ("second", "first", "second"):
        assert answer(engine, adapter=name) == expected[name]
        assert lora.active_adapter == "first"
        assert stock(tiny) == expected["first"]
    assert engine.adapters.names == ("first", "second")


def test_a_wrapped_model_is_served_by_its_adapter(tiny: TinyModel) -> None:
    plain = stock(tiny)
    lora = with_adapters(tiny.model, "first")
    with Engine(lora, tiny.tokenizer, config=CONFIG) as engine:
        assert answer(engine) == stock(tiny) != plain
        assert answer(engine, adapter="first") == stock(tiny)
        with lora.disable_adapter():
            assert answer(engine) == plain


def test_the_plain_model_keeps_its_namespace(engine: Engine, lora: PeftModel) -> None:
    """Snapshots that were made before still load."""
    with Engine(*tiny_model(), config=CONFIG) as other, lora.disable_adapter():
        assert engine.namespace() == other.namespace() == engine.home()


def test_unknown_adapters_are_refused_by_name(engine: Engine, lora: PeftModel) -> None:
    for ask in (engine.submit, engine.context, engine.explain):
        with pytest.raises(UnknownAdapter, match="'third'; loaded: first, second"):
            ask(PROMPT, adapter="third")


# Contexts and snapshots


def test_a_context_waits_for_its_weights(engine: Engine, tiny: TinyModel, lora: PeftModel) -> None:
    context = engine.context(PROMPT, name="notes")
    fork = context.fork()
    expected = stock(tiny)
    lora.set_adapter("second")
    for use in (
        lambda: context.extend("x"),
        lambda: context.generate(max_new_tokens=4),
        lambda: fork.generate(max_new_tokens=4),
        context.to_hf_cache,
        context.repair,
    ):
        with pytest.raises(WeightsChanged, match=r"computed by other weights .* bring those back"):
            use()
    assert context.fork().tokens == context.tokens
    lora.set_adapter("first")

    assert list(context.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids) == expected
    assert list(fork.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids) == expected


def test_a_context_of_an_adapter_is_of_that_adapter(engine: Engine, tiny: TinyModel, lora: PeftModel) -> None:
    lora.set_adapter("second")
    expected = stock(tiny, PROMPT + "Say. ")
    lora.set_adapter("first")
    context = engine.context(PROMPT, adapter="second").fork().extend("Say. ")

    assert list(context.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids) == expected
    fill(lora, "second", seed=9)
    with pytest.raises(WeightsChanged, match="adapter 'second'"):
        context.extend("x")
    lora.delete_adapter("second")
    with pytest.raises(WeightsChanged, match=r"adapter 'second' .* is gone; load it again"):
        context.extend("x")


def test_an_empty_context_is_of_the_weights_that_it_is_first_computed_by(
    engine: Engine, tiny: TinyModel, lora: PeftModel
) -> None:
    context = engine.empty_context()
    lora.set_adapter("second")
    context.extend(PROMPT)

    assert list(context.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids) == stock(tiny)


def test_snapshots_belong_to_an_adapter_in_every_process(engine: Engine, lora: PeftModel, tmp_path: Path) -> None:
    file = engine.context(PROMPT, adapter="second").save(tmp_path / "second.kv")
    expected = answer(engine, adapter="second")
    for adapter in (None, "first"):
        with pytest.raises(SnapshotForeign):
            engine.restore(file, adapter=adapter)
    other = tiny_model()
    with Engine(other.model, other.tokenizer, config=CONFIG) as elsewhere:
        elsewhere.adapters.load("renamed", save_lora(tmp_path / "lora", seed=2))
        context = elsewhere.restore(file, adapter="renamed")
        assert list(context.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids) == expected
        with pytest.raises(SnapshotForeign):
            elsewhere.restore(file)


# Loading


def test_adapters_are_loaded_from_folders(engine: Engine, tiny: TinyModel, tmp_path: Path) -> None:
    plain = answer(engine)
    for seed, name in enumerate(("poet", "judge"), start=1):
        engine.adapters.load(name, str(save_lora(tmp_path / name, seed=seed)))
        assert answer(engine) == plain == stock(tiny)
    answers = {name: answer(engine, adapter=name) for name in engine.adapters.names}

    for seed, name in enumerate(("poet", "judge"), start=1):
        other = tiny_model()
        with_adapters(other.model, "poet")
        fill(other.model, "poet", seed=seed)
        assert answers[name] == stock(other) != plain
    tiny.model.set_adapter("judge")
    engine.adapters.unload("poet")
    assert engine.adapters.names == ("judge",)
    assert answer(engine) == answers["judge"] == stock(tiny)


def test_an_adapter_that_does_not_fit_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    good = save_lora(tmp_path / "good", seed=1)
    plain = answer(engine)
    with pytest.raises(InvalidRequest, match="bad adapter name 'a:b'"):
        engine.adapters.load("a:b", good)
    with pytest.raises(ModelLoadError, match=r"no adapter_config\.json"):
        engine.adapters.load("none", tmp_path)
    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"no adapter_model\.safetensors"):
        engine.adapters.load("pickled", good)
    for damage in (b"", b"x" * 100):
        (good / "adapter_model.safetensors").write_bytes(damage)
        with pytest.raises(ModelLoadError, match="no adapter that fits"):
            engine.adapters.load("damaged", good)
    (good / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(ModelLoadError, match="no adapter that fits"):
        engine.adapters.load("unknown", good)
    assert engine.adapters.names == ()
    assert answer(engine) == plain
    with pytest.raises(UnknownAdapter):
        engine.adapters.unload("damaged")


# Requests that run


def test_requests_with_several_adapters_take_turns(engine: Engine, tiny: TinyModel, lora: PeftModel) -> None:
    """Forked, batched and mixed: every answer is that of its own adapter."""
    prompts = [f"{PROMPT}{index}" for index in range(3)]
    expected = {}
    for name in ("second", "first"):
        lora.set_adapter(name)
        expected |= {(name, prompt): stock(tiny, prompt) for prompt in prompts}
    with lora.disable_adapter():
        expected |= {("", prompt): stock(tiny, prompt) for prompt in prompts}
    lora.base_model.disable_adapter_layers()
    handles = {
        key: engine.submit(key[1], adapter=key[0] or None, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        for key in expected
    }
    for key, handle in handles.items():
        assert list(handle.result().token_ids) == expected[key]


def test_nobody_starves(engine: Engine, lora: PeftModel) -> None:
    """Between two passes for an adapter there is one for every other that has work."""
    passes: list[str] = []
    serving = engine.runner.serving

    def noted(weights, **more):  # type: ignore[no-untyped-def]
        passes.append(weights.digest)
        return serving(weights, **more)

    engine.runner.serving = noted  # type: ignore[method-assign]
    with engine.lock:
        handles = [
            engine.submit(f"{PROMPT}{index}", adapter=name, max_new_tokens=8, ignore_eos=True)
            for index, name in enumerate(["first"] * 5 + ["second"])
        ]
    for handle in handles:
        handle.result()
    ends = [len(passes) - passes[::-1].index(engine.live.now(name).digest) for name in ("first", "second")]
    both = passes[: min(ends)]  # while both had work: right guesses may end the answers of either sooner
    assert all(left != right for left, right in itertools.pairwise(both[1:])), both


def test_a_choice_by_hand_does_not_reach_an_answer_that_has_begun(
    engine: Engine, tiny: TinyModel, lora: PeftModel
) -> None:
    expected = stock(tiny, num_tokens=40)
    handle = engine.submit(PROMPT, max_new_tokens=40, ignore_eos=True)
    chunks = iter(handle)
    found = list(next(chunks).token_ids)
    lora.set_adapter("second")
    for chunk in chunks:
        found += chunk.token_ids
        lora.set_adapter("first" if len(found) % 2 else "second")

    assert found == expected
    assert engine.cache.num_cached(PROMPT, adapter="first") > 0


@pytest.mark.parametrize("change", [load_other_weights, write_through_data])
def test_an_answer_whose_weights_change_ends_by_name_and_leaves_nothing(
    change: Callable[[LlamaForCausalLM], None], engine: Engine, tiny: TinyModel
) -> None:
    handle = engine.submit(PROMPT, max_new_tokens=100, ignore_eos=True)
    chunks = iter(handle)
    next(chunks)
    with engine.lock:
        change(tiny.model)
    with pytest.raises(WeightsChanged, match="others now than those that this began with"):
        handle.result()
    chunks.close()
    assert answer(engine) == stock(tiny)
    assert answer(engine, "Other") == stock(tiny, "Other")


def test_a_request_that_waits_means_the_weights_that_there_are_when_it_begins(engine: Engine, tiny: TinyModel) -> None:
    with engine.lock:
        handle = engine.submit(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        load_other_weights(tiny.model)
    assert list(handle.result().token_ids) == stock(tiny)


def test_a_request_that_waits_for_an_adapter_that_goes_fails_by_name(engine: Engine, lora: PeftModel) -> None:
    with engine.lock:
        handle = engine.submit(PROMPT, adapter="second", max_new_tokens=4)
        lora.delete_adapter("second")
    with pytest.raises(UnknownAdapter, match="second"):
        handle.result()


def test_answers_while_training_are_those_of_evaluation_mode(tiny: TinyModel) -> None:
    lora = with_adapters(tiny.model, "first", lora_dropout=0.5)
    expected = stock(tiny)
    with Engine(lora, tiny.tokenizer, config=CONFIG) as engine:
        lora.train()
        assert answer(engine) == expected
        assert lora.training
        assert tiny.model.model.layers[0].training


def test_a_model_that_became_another_kind_fails_requests_not_the_engine(engine: Engine, tiny: TinyModel) -> None:
    before = answer(engine)
    rotary = tiny.model.model.rotary_emb.inv_freq.clone()
    with torch.inference_mode(False):
        tiny.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(WeightsChanged, match="make a new engine"):
        answer(engine)
    tiny.model.model.rotary_emb.inv_freq.copy_(rotary)
    assert answer(engine) == before


# Memory


def test_quotas_and_clearing_concern_all_adapters(engine: Engine, lora: PeftModel) -> None:
    engine.cache.set_quota(cached_tokens=8, tenant="small")
    for adapter in (None, "first", "second"):
        for index in range(3):
            engine.generate(f"{index} {PROMPT}", adapter=adapter, tenant="small", max_new_tokens=4)
        assert cached_by(engine, engine.namespace("small", adapter=adapter)).num_pages <= 2
    engine.cache.clear(tenant="small")
    assert all(cached_by(engine, each).num_pages == 0 for each in engine.tenancy.namespaces("small"))


def test_held_tokens_count_over_all_adapters(engine: Engine, lora: PeftModel) -> None:
    held = engine.context(PROMPT, adapter="first", tenant="small")
    engine.cache.set_quota(held_tokens=held.num_tokens + 8, tenant="small")
    with pytest.raises(QuotaExceeded):
        engine.context(PROMPT, adapter="second", tenant="small")
    held.release()


def test_many_threads_with_many_adapters(engine: Engine, tiny: TinyModel, lora: PeftModel) -> None:
    expected = {}
    for name in ("second", "first"):
        lora.set_adapter(name)
        expected[name] = stock(tiny)
    found: list[tuple[str, list[int]]] = []

    def ask(name: str) -> None:
        found.extend((name, answer(engine, adapter=name)) for _ in range(3))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    assert all(tokens == expected[name] for name, tokens in found)


def test_two_engines_on_one_model_do_not_disturb_each_other(tiny: TinyModel, lora: PeftModel) -> None:
    expected = {}
    for name in ("second", "first"):
        lora.set_adapter(name)
        expected[name] = stock(tiny, num_tokens=40)
    with (
        Engine(lora, tiny.tokenizer, config=CONFIG) as left,
        Engine(lora, tiny.tokenizer, config=CONFIG) as right,
    ):
        handles = [
            (name, engine.submit(PROMPT, adapter=name, max_new_tokens=40, ignore_eos=True))
            for name in ("first", "second")
            for engine in (left, right)
        ]
        for name, handle in handles:
            assert list(handle.result().token_ids) == expected[name]
    assert lora.active_adapter == "first"


def test_what_is_learned_belongs_to_an_adapter(engine: Engine, lora: PeftModel) -> None:
    """Idle work runs under the adapter that it is for, and what it teaches is not known to others."""
    note = engine.segment("The dog is lazy, the fox is quick.", name="note")
    read, think = engine.segment("Read this: "), engine.segment("Now think of it. ")
    for adapter in (None, "second"):
        engine.generate([read, note], adapter=adapter, max_new_tokens=2)
    assert engine.reuse.learn([think, note, read], adapter="second").result() > 0
    assert list(engine.reuse.parts.anchors.banks(engine.namespace(adapter="second")))
    assert not list(engine.reuse.parts.anchors.banks(engine.namespace()))


def test_idle_work_on_weights_that_are_gone_is_given_up_by_name(engine: Engine, tiny: TinyModel) -> None:
    with engine.lock:
        future = engine.reuse.learn(PROMPT * 3)
        load_other_weights(tiny.model)
    with pytest.raises(WeightsChanged):
        future.result()
    assert engine.cache.num_cached(PROMPT * 3) == 0
    assert answer(engine, PROMPT * 3) == stock(tiny, PROMPT * 3)
