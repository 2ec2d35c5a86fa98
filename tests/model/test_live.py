"""Watched weights: every change is seen, and the identity is that of the contents."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM

from kvcomm.errors import UnknownAdapter, UnsupportedModel, WeightsChanged
from kvcomm.model.adapters import sort_tree, without_wrapper
from kvcomm.model.live import LiveWeights
from kvcomm.model.weights import weights_digest
from tests.lora import fill, lora_config, with_adapters
from tests.tiny import TinyModel, tiny_model

Change = Callable[[LlamaForCausalLM], None]


def load_other_weights(model: LlamaForCausalLM) -> None:
    model.load_state_dict(tiny_model(seed=1).model.state_dict())


def load_by_exchange(model: LlamaForCausalLM) -> None:
    model.load_state_dict(tiny_model(seed=1).model.state_dict(), assign=True)


def exchange_data(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 2


def exchange_parameter(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.data * 2)


def exchange_module(model: LlamaForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj = tiny_model(seed=1).model.model.layers[0].mlp.up_proj


def exchange_layers(model: LlamaForCausalLM) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def swap_tensors(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].mlp
    torch.utils.swap_tensors(layer.up_proj.weight, layer.gate_proj.weight)


def step_of_an_optimizer(model: LlamaForCausalLM) -> None:
    model.requires_grad_(True)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def write_one_number(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1


def write_in_inference_mode(model: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        model.model.norm.weight.mul_(2)


def write_through_data(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(1.01)


def write_through_numpy(model: LlamaForCausalLM) -> None:
    model.model.layers[1].input_layernorm.weight.detach().numpy()[:] *= 1.01


def add_a_bias(model: LlamaForCausalLM) -> None:
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrize_a_weight(model: LlamaForCausalLM) -> None:
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Doubled())


def merge_lora(model: LlamaForCausalLM) -> None:
    with_adapters(model, "first").merge_and_unload()


PLAIN_CHANGES = [
    load_other_weights,
    load_by_exchange,
    exchange_data,
    exchange_parameter,
    exchange_module,
    exchange_layers,
    swap_tensors,
    step_of_an_optimizer,
    write_one_number,
    write_in_inference_mode,
    write_through_data,
    write_through_numpy,
    add_a_bias,
    parametrize_a_weight,
    merge_lora,
]


@pytest.mark.parametrize("change", PLAIN_CHANGES)
def test_changes_are_seen(change: Change, tiny: TinyModel) -> None:
    live = LiveWeights(tiny.model)
    before = live.now()
    change(tiny.model)

    with pytest.raises(WeightsChanged):
        live.require(before, closely=True)
    assert live.now(closely=True).digest != before.digest


def test_a_lora_that_is_attached_later_computes_from_then_on(tiny: TinyModel) -> None:
    """What began without it can go on without it."""
    live = LiveWeights(tiny.model)
    before = live.now()
    with_adapters(tiny.model, "first")

    assert live.now().digest == live.now("first").digest != before.digest
    live.require(before, closely=True)


@pytest.mark.parametrize("change", PLAIN_CHANGES)
def test_an_identity_is_that_of_the_contents(change: Change, tiny: TinyModel) -> None:
    live = LiveWeights(tiny.model)
    change(tiny.model)

    assert live.now(closely=True).digest == weights_digest(tiny.model)


def test_former_weights_are_the_former_identity(tiny: TinyModel) -> None:
    live, former = LiveWeights(tiny.model), copy.deepcopy(tiny.model.state_dict())
    before = live.now()
    load_other_weights(tiny.model)
    live.now()
    tiny.model.load_state_dict(former)

    live.require(before, closely=True)


def train_nothing(model: LlamaForCausalLM) -> None:
    model.train()
    model.requires_grad_(False)
    model.requires_grad_(True)


def exchange_for_the_same(model: LlamaForCausalLM) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def add_an_adapter_that_is_not_used(model: LlamaForCausalLM) -> None:
    with_adapters(model, "first").base_model.disable_adapter_layers()


@pytest.mark.parametrize("change", [train_nothing, exchange_for_the_same, add_an_adapter_that_is_not_used])
def test_what_computes_the_same_is_the_same(change: Change, tiny: TinyModel) -> None:
    live = LiveWeights(tiny.model)
    before = live.now()
    change(tiny.model)

    live.require(before, closely=True)
    assert live.now(closely=True).digest == before.digest == weights_digest(tiny.model)


def test_writing_past_torch_is_seen_only_when_looking_closely(tiny: TinyModel) -> None:
    """What the module says about itself; `forget` is there for the rest."""
    live = LiveWeights(tiny.model)
    before = live.now()
    tiny.model.lm_head.weight.data.mul_(2)

    live.require(before)
    with pytest.raises(WeightsChanged):
        live.require(before, closely=True)


def test_what_is_not_seen_can_be_told(tiny: TinyModel) -> None:
    first, second = LiveWeights(tiny.model), LiveWeights(tiny_model().model)
    before = first.now()
    for live in (first, second):
        live.forget()

    assert len({before.digest, first.now().digest, second.now().digest}) == 3
    assert first.now().digest == first.now(closely=True).digest


def test_an_exchanged_tensor_is_not_kept_alive(tiny: TinyModel) -> None:
    """Loading weights by exchange into a model that nearly fills the memory must not need it twice."""
    live = LiveWeights(tiny.model)
    live.now(closely=True)
    former = weakref.ref(tiny.model.lm_head.weight)
    load_by_exchange(tiny.model)
    gc.collect()

    assert former() is None


def test_another_kind_of_model_is_refused(tiny: TinyModel) -> None:
    live = LiveWeights(tiny.model)
    before = live.now()
    tiny.model.to(torch.bfloat16)
    with pytest.raises(WeightsChanged, match=r"2 layers in float32 .* in bfloat16 .* make a new engine"):
        live.now()
    # As a user would go back: casting has rounded the rotary frequencies, too.
    tiny.model.load_state_dict({k: v.float() for k, v in tiny_model().model.state_dict().items()}, assign=True)
    with pytest.raises(WeightsChanged, match="rotary frequencies"):
        live.now()
    tiny.model.model.rotary_emb = tiny_model().model.model.rotary_emb
    live.require(before, closely=True)


def test_other_rotary_frequencies_are_refused(tiny: TinyModel) -> None:
    """They follow from the config, which says how KV is moved."""
    live = LiveWeights(tiny.model)
    tiny.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(WeightsChanged, match="rotary frequencies"):
        live.now()


# Adapters


@pytest.fixture
def lora(tiny: TinyModel) -> PeftModel:
    """With the adapters "first", which is active, and "second"."""
    return with_adapters(tiny.model, "first", "second")


def test_adapters_are_told_apart_and_come_back(tiny: TinyModel, lora: PeftModel) -> None:
    live, plain = LiveWeights(tiny.model), weights_digest(tiny_model().model)
    first = live.now()
    lora.set_adapter("second")
    second = live.now()
    with lora.disable_adapter():
        assert live.now().digest == plain
    lora.base_model.set_adapter(["first", "second"])
    both = live.now()
    lora.set_adapter("first")

    assert len({plain, first.digest, second.digest, both.digest}) == 4
    assert live.now().digest == first.digest == live.now("first").digest
    assert live.now("second").digest == second.digest
    assert live.adapters == ("first", "second")


def test_an_adapter_has_one_identity_whatever_its_name_and_whenever_it_comes(tiny: TinyModel, lora: PeftModel) -> None:
    """Snapshots of another process restore."""
    live = LiveWeights(tiny.model)
    other = tiny_model().model
    late = LiveWeights(other, weights_digest(other))
    late.now()
    wrapped = with_adapters(other, "early")
    wrapped.add_adapter("late", lora_config())
    fill(wrapped, "late", seed=2)

    assert late.now("early").digest == live.now("first").digest
    assert late.now("late").digest == live.now("second").digest


def scale(lora: PeftModel) -> None:
    for module in lora.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", 0.5)


def train_the_adapter(lora: PeftModel) -> None:
    fill(lora, "first", seed=9)


def merge(lora: PeftModel) -> None:
    lora.merge_adapter(["first"])


def merge_and_disable(lora: PeftModel) -> None:
    """PEFT takes a merged adapter out of the weights again when it is disabled, within the next pass."""
    lora.merge_adapter(["first"])
    lora.base_model.disable_adapter_layers()


def delete(lora: PeftModel) -> None:
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        lora.delete_adapter("first")


@pytest.mark.parametrize("change", [scale, train_the_adapter, merge, merge_and_disable, delete])
def test_changes_of_an_active_adapter_are_seen(
    change: Callable[[PeftModel], None], tiny: TinyModel, lora: PeftModel
) -> None:
    live = LiveWeights(tiny.model)
    before = live.now(closely=True)
    change(lora)

    assert live.now(closely=True).digest != before.digest


@pytest.mark.parametrize("merging", ["merge_adapter", "merge_and_unload"])
def test_merging_is_seen_wherever_it_writes(merging: str, tiny: TinyModel, lora: PeftModel) -> None:
    """PEFT writes past version counters, and an adapter may change a single row that nobody looks at."""
    for name, tensor in lora.named_parameters():
        if "lora_B" in name:
            tensor.data[torch.arange(len(tensor)) != 5] = 0
    live = LiveWeights(tiny.model)
    with lora.disable_adapter():
        plain = live.now(closely=True)
    getattr(lora, merging)()
    merged = live.now(closely=True)

    assert merged.digest == weights_digest(tiny.model) != plain.digest


def test_changes_of_others_do_not_matter(tiny: TinyModel, lora: PeftModel) -> None:
    live = LiveWeights(tiny.model)
    first, second = live.now("first"), live.now("second")
    fill(lora, "second", seed=9)
    lora.add_adapter("third", lora_config())

    live.require(first, closely=True)
    with pytest.raises(WeightsChanged):
        live.require(second, closely=True)
    lora.delete_adapter("second")
    live.require(first, closely=True)
    with pytest.raises(WeightsChanged):
        live.require(second)


def test_a_scale_that_is_lent_is_followed(tiny: TinyModel, lora: PeftModel) -> None:
    live = LiveWeights(tiny.model)
    before = live.now()
    with rescale_adapter_scale(lora, 0.5):
        assert live.now().digest != before.digest
    live.require(before, closely=True)


def test_unknown_and_merged_adapters_are_refused_by_name(tiny: TinyModel, lora: PeftModel) -> None:
    live = LiveWeights(tiny.model)
    with pytest.raises(UnknownAdapter, match="'third'; loaded: first, second"):
        live.now("third")
    lora.merge_adapter(["second"])
    with pytest.raises(WeightsChanged, match="unmerge"):
        live.now("first")
    lora.unmerge_adapter()
    live.now("first")


KINDS: dict[str, dict[str, object]] = {
    "dora": {"use_dora": True},
    "everywhere": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "rank-stabilized": {"use_rslora": True},
    "biased": {"lora_bias": True},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_the_model_under_adapters_of_every_kind_keeps_its_identity(
    settings: dict[str, object], tiny: TinyModel
) -> None:
    live, plain = LiveWeights(tiny.model), weights_digest(tiny.model)
    lora = with_adapters(tiny.model, "first", "second", **settings)

    assert weights_digest(tiny.model) == plain
    assert len({plain, live.now("first").digest, live.now("second").digest}) == 3
    assert live.now().digest == live.now("first").digest
    lora.set_adapter("second")
    assert live.now().digest == live.now("second").digest


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[5, 6, 7, 3, 5]])).logits
    return found


@pytest.mark.parametrize("settings", [{}, *KINDS.values()], ids=["plain", *KINDS.keys()])
def test_a_pass_uses_its_adapters_and_leaves_the_user_s_choice(settings: dict[str, object], tiny: TinyModel) -> None:
    plain = logits(tiny.model)
    live = LiveWeights(tiny.model)
    base = live.now()
    lora = with_adapters(tiny.model, "first", "second", **settings)
    expected = {"first": logits(lora)}
    lora.set_adapter("second")
    expected["second"] = logits(lora)
    choices = [layer.choice for layer in sort_tree(tiny.model).layers]
    for weights, wanted in ((live.now("first"), expected["first"]), (base, plain), (live.now(), expected["second"])):
        with live.switched(weights) as this:
            assert torch.equal(logits(tiny.model), wanted)
            assert [layer.choice for layer in sort_tree(tiny.model).layers] == choices, (
                "others see what the user has chosen"
            )
            assert live.now().digest == live.now("second").digest
        assert live.confirm(this, weights)
        assert torch.equal(logits(tiny.model), expected["second"])


def test_passes_are_in_evaluation_mode_and_training_goes_on(tiny: TinyModel) -> None:
    lora = with_adapters(tiny.model, "first", lora_dropout=0.5)
    live, expected = LiveWeights(tiny.model), logits(lora)
    lora.train()
    with live.switched(live.now()):
        assert torch.equal(logits(tiny.model), expected)
    assert all(module.training for module in tiny.model.modules())


def test_a_choice_made_while_a_pass_runs_stays_and_the_pass_does_not_count(tiny: TinyModel, lora: PeftModel) -> None:
    live = LiveWeights(tiny.model)
    for weights in (live.now("second"), live.now()):
        lora.set_adapter("first")
        live.now()
        with live.switched(weights) as this:
            lora.set_adapter("second")
        assert not live.confirm(this, weights)
        assert lora.active_adapter == "second"
        assert live.now().digest == live.now("second").digest


def test_learned_tokens_before_every_prompt_are_refused(tiny: TinyModel) -> None:
    wrapped: Any = get_peft_model(tiny.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModel, match="learned tokens"):
        without_wrapper(wrapped)


def test_quantized_tensors_are_looked_into(tiny: TinyModel) -> None:
    """A tensor of a class of its own has no bytes of its own."""
    from torch.testing._internal.two_tensor import TwoTensor

    weight = tiny.model.model.norm.weight.data
    tiny.model.model.norm.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    live = LiveWeights(tiny.model)
    before = live.now(closely=True)
    live.require(before, closely=True)
    tiny.model.model.norm.weight.a.mul_(2)

    assert live.now(closely=True).digest != before.digest


def test_config_is_what_peft_saves(tmp_path: Path) -> None:
    """The helper makes what users have."""
    from tests.lora import save_lora

    folder = save_lora(tmp_path / "lora", seed=1)
    assert isinstance(LoraConfig.from_pretrained(folder), LoraConfig)
