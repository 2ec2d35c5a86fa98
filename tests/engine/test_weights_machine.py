"""Whatever is done to weights and adapters between requests, every answer is the stock forward's of that moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcomm import Engine, EngineConfig
from kvcomm.engine.context import Context
from kvcomm.errors import WeightsChanged
from tests.engine.conftest import greedy
from tests.lora import fill, with_adapters
from tests.tiny import tiny_model

# PEFT says that it unmerges before it chooses.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")

NAMES = ("first", "second")
PROMPTS = ("The dog minds. ", "The dog is lazy and jumps. ", "The dog is lazy and sleeps. ")
NUM_TOKENS = 4

names = strategies.sampled_from((None, *NAMES))
prompts = strategies.sampled_from(PROMPTS)
seeds = strategies.integers(0, 3)


class WeightsMachine(RuleBasedStateMachine):
    """The oracle is a second model to which the same is done, and which is run without any cache."""

    @initialize()
    def begin(self) -> None:
        tiny = tiny_model()
        self.lora, self.tokenizer = with_adapters(tiny.model, *NAMES), tiny.tokenizer
        other = tiny_model().model
        self.oracle = with_adapters(other, *NAMES)
        self.engine = Engine(
            self.lora, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=256, prefill_chunk=8)
        )
        self.contexts: list[tuple[Context, str]] = []

    def both(self) -> tuple[Any, Any]:
        return self.lora, self.oracle

    def expected(self, token_ids: list[int], adapter: str | None) -> list[int]:
        if adapter is None:
            return greedy(self.oracle, token_ids, NUM_TOKENS)
        layers = [layer for layer in self.oracle.modules() if hasattr(layer, "_active_adapter")]
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [adapter], False
        try:
            return greedy(self.oracle, token_ids, NUM_TOKENS)
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    @property
    def is_merged(self) -> bool:
        return any(getattr(layer, "merged", False) for layer in self.oracle.modules())

    def require_same(self, found: object, token_ids: list[int], adapter: str | None) -> None:
        assert list(found) == self.expected(token_ids, adapter)  # type: ignore[call-overload]

    @rule(prompt=prompts, adapter=names)
    def generate(self, prompt: str, adapter: str | None) -> None:
        if adapter is not None and self.is_merged:
            adapter = None
        found = self.engine.generate(prompt, adapter=adapter, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        self.require_same(found.token_ids, self.tokenizer(prompt)["input_ids"], adapter)

    @rule()
    def generate_all_at_once(self) -> None:
        if self.is_merged:
            return
        asked = [(prompt, adapter) for prompt in PROMPTS[:2] for adapter in (None, *NAMES)]
        handles = [
            self.engine.submit(prompt, adapter=adapter, max_new_tokens=NUM_TOKENS, ignore_eos=True)
            for prompt, adapter in asked
        ]
        for (prompt, adapter), handle in zip(asked, handles, strict=True):
            self.require_same(handle.result().token_ids, self.tokenizer(prompt)["input_ids"], adapter)

    @rule(prompt=prompts, adapter=names)
    def open(self, prompt: str, adapter: str | None) -> None:
        if self.is_merged or len(self.contexts) > 3:
            return
        context = self.engine.context(prompt, adapter=adapter)
        self.contexts.append((context, context.weights.digest))

    @precondition(lambda self: self.contexts)
    @rule(data=strategies.data())
    def fork_and_go_on(self, data: Any) -> None:
        context, digest = data.draw(strategies.sampled_from(self.contexts))
        with context.fork() as fork:
            tokens = list(fork.tokens)
            try:
                found = fork.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True)
            except WeightsChanged:
                assert self.is_merged or self.engine.live.now(fork.adapter, closely=True).digest != digest
                return
            self.require_same(found.token_ids, tokens, fork.adapter)

    @precondition(lambda self: self.contexts)
    @rule()
    def release(self) -> None:
        self.contexts.pop()[0].release()

    @rule(name=strategies.sampled_from(NAMES))
    def choose(self, name: str) -> None:
        for model in self.both():
            model.set_adapter(name)

    @rule(is_enabled=strategies.booleans())
    def enable(self, is_enabled: bool) -> None:
        for model in self.both():
            (model.base_model.enable_adapter_layers if is_enabled else model.base_model.disable_adapter_layers)()

    @rule(name=strategies.sampled_from(NAMES), seed=seeds)
    def train(self, name: str, seed: int) -> None:
        if not self.is_merged:  # an adapter that was changed cannot be taken out of the weights again
            for model in self.both():
                fill(model, name, seed=seed)

    @rule(seed=seeds)
    def load_weights(self, seed: int) -> None:
        if self.is_merged:
            return
        former = tiny_model(seed=seed).model.state_dict()
        for model in self.both():
            with torch.no_grad():
                for name, tensor in model.base_model.model.named_parameters():
                    plain = name.replace(".base_layer", "")
                    if plain in former:
                        tensor.copy_(former[plain])

    @rule(factor=strategies.sampled_from((0.5, 2.0)), row=strategies.integers(0, 1))
    def write_past_torch(self, factor: float, row: int) -> None:
        for model in self.both():
            model.base_model.model.model.layers[row].mlp.up_proj.weight.data.mul_(factor)

    @rule()
    def merge(self) -> None:
        if not self.is_merged:
            for model in self.both():
                model.merge_adapter()

    @rule()
    def unmerge(self) -> None:
        if self.is_merged:
            for model in self.both():
                model.unmerge_adapter()

    @rule(is_training=strategies.booleans())
    def set_training(self, is_training: bool) -> None:
        self.lora.train(is_training)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "engine"):
            self.engine.wait_idle()
            self.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


TestWeightsMachine = WeightsMachine.TestCase
TestWeightsMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
