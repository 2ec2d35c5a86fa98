"""Geometry against what each family's documentation says, its moves against the model's own keys, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomm.errors import UnsupportedModel
from kvcomm.model import geometry as geometry_module
from kvcomm.model.families import random_model
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.rope import rotate
from tests.model.architectures import FAMILIES, GROUPED, SIZES, tiny_model

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
movable = pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.moves))

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@every_family
def test_layers_are_what_the_family_says(name: str) -> None:
    family, model = FAMILIES[name], tiny_model(name)
    geometry = ModelGeometry.from_model(model)
    layers = geometry.layers
    assert geometry.architecture == type(model).__name__
    assert [layer.num_heads for layer in layers] == [4, 4, 4]
    assert {layer.num_kv_heads for layer in layers} == {family.num_kv_heads}
    assert {(layer.key_dim, layer.value_dim) for layer in layers} == {(family.head_dim, family.head_dim)}
    assert tuple(layer.sliding_window for layer in layers) == family.windows
    assert tuple(layer.rope.rotary_dim if layer.rope else None for layer in layers) == family.rotary_dims
    assert {layer.rope.kind for layer in layers if layer.rope} <= {family.kind}
    assert {layer.rope.interleaved for layer in layers if layer.rope} <= {family.interleaved}
    assert {(layer.softcap, layer.has_sinks) for layer in layers} == {(family.softcap, family.has_sinks)}
    assert (geometry.immovable is None) == family.moves
    assert (geometry.max_context, geometry.vocab_size, geometry.dtype) == (256, 97, torch.float32)
    assert geometry.kv_bytes_per_token == 3 * family.num_kv_heads * 2 * family.head_dim * 4


def keys_at(model: PreTrainedModel, token_ids: list[int], first: int) -> list[Tensor]:
    """Keys of every layer, [num_kv_heads, num_tokens, head_dim], as the stock model caches them."""
    cache = DynamicCache()
    positions = torch.arange(first, first + len(token_ids))[None]
    with torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


@movable
@pytest.mark.parametrize(("source", "target"), [(0, 1), (3, 200), (200, 3), (90, 91)])
def test_moves_the_first_layers_keys_as_the_model_does(name: str, source: int, target: int) -> None:
    """The first layer's keys depend on token and position only."""
    model = tiny_model(name)
    layer = ModelGeometry.from_model(model).layers[0]
    token_ids = [5, 17, 90, 17, 4]
    here, there = keys_at(model, token_ids, source)[0], keys_at(model, token_ids, target)[0]
    assert layer.rope is not None
    torch.testing.assert_close(rotate(here, target - source, layer.rope), there, rtol=0, atol=1e-4 * here.abs().max())


@movable
@pytest.mark.parametrize(("source", "target"), [(0, 1), (7, 250), (250, 7)])
def test_moves_a_lone_tokens_keys_in_every_layer(name: str, source: int, target: int) -> None:
    """A token that sees only itself has the same hidden states at every position."""
    model = tiny_model(name)
    here, there = keys_at(model, [42], source), keys_at(model, [42], target)
    for layer, key, moved in zip(ModelGeometry.from_model(model).layers, here, there, strict=True):
        got = key if layer.rope is None else rotate(key, target - source, layer.rope)
        torch.testing.assert_close(got, moved, rtol=0, atol=1e-4 * float(key.abs().max()))


def test_layers_of_one_model_may_rotate_at_different_speeds() -> None:
    """Gemma 3: local layers use base 10,000, global ones base 1,000,000."""
    ropes = [layer.rope for layer in ModelGeometry.from_model(tiny_model("gemma3")).layers]
    speeds = [rope.inv_freq[1] for rope in ropes if rope is not None]
    assert speeds == pytest.approx([1e4**-0.125, 1e6**-0.125, 1e4**-0.125])


def test_attention_scaling_of_yarn_is_read_and_cancels() -> None:
    rope = ModelGeometry.from_model(tiny_model("yarn-rope")).layers[0].rope
    assert rope is not None
    assert rope.attention_scaling == pytest.approx(0.1 * np.log(4.0) + 1)


def test_scale_is_the_models_own() -> None:
    assert ModelGeometry.from_model(tiny_model("llama")).layers[0].scale == pytest.approx(12**-0.5)
    assert ModelGeometry.from_model(tiny_model("granite")).layers[0].scale == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "glm", "cohere2"])
def test_low_precision_keys_still_reveal_their_rotation(name: str, dtype: torch.dtype) -> None:
    model = random_model(FAMILIES[name].config()).to(dtype)
    geometry = ModelGeometry.from_model(model)
    exact = ModelGeometry.from_model(tiny_model(name))
    assert geometry.dtype == dtype
    assert geometry.immovable is None
    for layer, float32_layer in zip(geometry.layers, exact.layers, strict=True):
        assert (layer.rope is None) == (float32_layer.rope is None)
        if layer.rope is not None and float32_layer.rope is not None:
            assert layer.rope.interleaved == float32_layer.rope.interleaved
            assert layer.rope.inv_freq == pytest.approx(float32_layer.rope.inv_freq, rel=1e-2)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = random_model(FAMILIES["mistral"].config())
    token_ids = torch.arange(3, 63)[None]
    with torch.inference_mode():
        before = model(input_ids=token_ids).logits
        ModelGeometry.from_model(model)
        assert torch.equal(model(input_ids=token_ids).logits, before)
    assert model.config._attn_implementation == "sdpa"


def test_learned_positions_cannot_be_moved() -> None:
    reason = ModelGeometry.from_model(tiny_model("gpt2")).immovable
    assert reason == "keys of layers 0, 1, 2 follow the position by no known rotation"


@pytest.mark.parametrize(
    ("config", "kind", "max_context"),
    [
        # Dynamic NTK stretches its frequencies beyond max_position_embeddings, longrope beyond the original length.
        (lambda: tf.LlamaConfig(**GROUPED, rope_parameters=dict(DYNAMIC_ROPE)), "dynamic", 256),
        (
            lambda: tf.Phi3Config(**GROUPED, rope_parameters=dict(LONGROPE), original_max_position_embeddings=64),
            "longrope",
            64,
        ),
        (lambda: tf.LlamaConfig(**GROUPED, rope_parameters=dict(LONGROPE)), "longrope", 64),
    ],
)
def test_length_dependent_rope_is_cached_only_where_its_frequencies_stay(
    config: Any, kind: str, max_context: int
) -> None:
    model = random_model(config())
    geometry = ModelGeometry.from_model(model)
    assert geometry.immovable == f"{kind} rope changes its frequencies with the length"
    assert geometry.max_context == max_context
    token_ids = [5 + index % 90 for index in range(max_context)]
    at_the_limit = keys_at(model, token_ids, 0)[0]
    shorter = keys_at(model, token_ids[:8], 0)[0]
    assert torch.equal(at_the_limit[:, :8], shorter)
    beyond = keys_at(model, [*token_ids, 7], 0)[0]
    assert not torch.allclose(beyond[:, :8], shorter, atol=1e-3)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOUR_LAYERS = GROUPED | {"num_hidden_layers": 4}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
SEQ2SEQ = {
    "vocab_size": 97,
    "d_model": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (
        lambda: tf.MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=8),
        "MambaForCausalLM is not supported: layers of type linear_attention keep a state that is not per-token KV",
    ),
    "qwen3-next, linear attention beside full": (
        lambda: tf.Qwen3NextConfig(
            **FOUR_LAYERS, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32, head_dim=16
        ),
        "Qwen3NextForCausalLM is not supported: layers of type linear_attention keep a state",
    ),
    "falcon-h1, a state space beside attention in every layer": (
        lambda: tf.FalconH1Config(
            **GROUPED, head_dim=12, mamba_d_ssm=96, mamba_n_heads=4, mamba_d_head=24, mamba_d_state=8
        ),
        "FalconH1ForCausalLM is not supported: layers of type hybrid keep a state",
    ),
    "lfm2, convolutions": (
        lambda: tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
        "Lfm2ForCausalLM is not supported: layers of type conv keep a state",
    ),
    "llama 4, attention in chunks": (
        lambda: tf.Llama4TextConfig(**FOUR_LAYERS, head_dim=12, num_local_experts=2, intermediate_size_mlp=64),
        "Llama4ForCausalLM is not supported: layers of type chunked_attention",
    ),
    "deepseek-v3, latents": (
        lambda: tf.DeepseekV3Config(**SIZES, **MLA, **EXPERTS, num_key_value_heads=4),
        "DeepseekV3ForCausalLM is not supported: multi-head latent attention",
    ),
    "doge, a mask made by the layer": (
        lambda: tf.DogeConfig(**GROUPED, keep_window_size=8),
        "DogeAttention makes an attention mask of its own",
    ),
    "gemma 3 as an encoder": (
        lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16, use_bidirectional_attention=True),
        "Gemma3ForCausalLM is not supported: its attention is not causal",
    ),
    "llama made bidirectional": (
        lambda: tf.LlamaConfig(**GROUPED, is_causal=False),
        "LlamaForCausalLM is not supported: its attention is not causal",
    ),
    "bert": (lambda: tf.BertConfig(**SIZES), "BertSelfAttention is not causal: it sees tokens that come later"),
    "mbart, which counts positions by itself": (
        lambda: tf.MBartConfig(**SEQ2SEQ, is_encoder_decoder=False, is_decoder=True, num_hidden_layers=2),
        "MBartForCausalLM is not supported: it ignores the positions it is given",
    ),
    "qwen2-moe, a window in the mask only": (
        lambda: tf.Qwen2MoeConfig(
            **GROUPED,
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=32,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
        "Qwen2MoeForCausalLM is not supported: it hides its sliding window in masks",
    ),
    "phimoe, a window in the mask only": (
        lambda: tf.PhimoeConfig(**GROUPED, num_local_experts=4, sliding_window=8),
        "PhimoeForCausalLM is not supported: it hides its sliding window in masks",
    ),
    "diffllama, two attentions a layer": (
        lambda: tf.DiffLlamaConfig(**GROUPED),
        "DiffLlamaForCausalLM is not supported: layer 0 attends more than once",
    ),
    "gpt-j, attention of its own": (
        lambda: tf.GPTJConfig(vocab_size=97, n_embd=48, n_layer=2, n_head=4, rotary_dim=8, n_positions=256),
        "GPTJForCausalLM is not supported: its layers attend by code of their own, which cannot be replaced$",
    ),
    "falcon, whose layers want a mask": (
        lambda: tf.FalconConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
        "FalconForCausalLM is not supported: its layers attend by code of their own, which cannot be replaced$",
    ),
    "bloom, alibi": (
        lambda: tf.BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=4),
        "BloomForCausalLM is not supported: its layers attend by code of their own, which cannot be replaced$",
    ),
    "xmod, which wants to know the language": (
        lambda: tf.XmodConfig(**SIZES, is_decoder=True),
        r"XmodForCausalLM is not supported: a pass over one token, with neither a mask nor a cache, fails in its code "
        r"\(ValueError: Input language unknown",
    ),
    "bart, whose config counts the layers of its encoder": (
        lambda: tf.BartConfig(**SEQ2SEQ | {"encoder_layers": 1}, is_encoder_decoder=False, is_decoder=True),
        "BartForCausalLM is not supported: 2 layers attend, and its config names 1",
    ),
    "mpt, alibi": (
        lambda: tf.MptConfig(vocab_size=97, d_model=48, n_heads=4, n_layers=2, max_seq_len=256),
        "MptForCausalLM is not supported: its layers attend by code of their own, which cannot be replaced$",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refuses_by_name_and_with_the_reason(name: str) -> None:
    config, message = REFUSED[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(), attn_implementation="eager").eval().float()
    with pytest.raises(UnsupportedModel, match=message):
        ModelGeometry.from_model(model)
    assert model.config._attn_implementation == "eager"


def test_refuses_encoder_decoders() -> None:
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4)
    )
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is not supported: it is an encoder-decoder"):
        ModelGeometry.from_model(model.eval())


def test_refuses_a_model_without_a_head() -> None:
    model = tf.LlamaModel(tf.LlamaConfig(**GROUPED)).eval()
    with pytest.raises(UnsupportedModel, match="LlamaModel is not supported: it has no head for logits; load it by"):
        ModelGeometry.from_model(model)


def test_a_module_may_hold_frequencies_and_nothing_else() -> None:
    model = random_model(FAMILIES["llama"].config())
    expected = ModelGeometry.from_model(model).layers
    other = torch.nn.Module()
    other.register_buffer("inv_freq", torch.ones(3))
    model.other = other
    assert ModelGeometry.from_model(model).layers == expected


def test_the_length_that_stays_is_read_where_each_type_of_layer_has_a_rope_of_its_own() -> None:
    config = FAMILIES["gemma3"].config()
    config.rope_parameters = {"full_attention": dict(LONGROPE), "sliding_attention": {"rope_type": "default"}}
    assert geometry_module._max_context(config) == 64


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Switch earlier checks off, so that a later one has to find the reason by itself."""
    for name in names:
        monkeypatch.setattr(geometry_module, name, lambda *_: None)


def test_hidden_state_is_found_without_help_from_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial alone must find a model whose config does not tell."""
    hide(monkeypatch, "_refuse_by_config")
    config, _ = REFUSED["falcon-h1, a state space beside attention in every layer"]
    with pytest.raises(UnsupportedModel, match=r"FalconH1ForCausalLM .* computed in two passes its logits differ by"):
        ModelGeometry.from_model(random_model(config()))


def test_counted_positions_are_found_by_the_trial_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "_refuse_other_positions")
    config, _ = REFUSED["mbart, which counts positions by itself"]
    with pytest.raises(UnsupportedModel, match=r"MBartForCausalLM .* computed in two passes its logits differ by"):
        ModelGeometry.from_model(random_model(config()))


def test_missing_layers_name_what_keeps_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "_refuse_by_config")
    config, _ = REFUSED["qwen3-next, linear attention beside full"]
    with pytest.raises(UnsupportedModel, match=r"only 1 of its 4 layers .*; Qwen3NextGatedDeltaNet keeps a recurrent"):
        ModelGeometry.from_model(random_model(config()))


def test_the_trial_does_not_mind_a_model_that_gives_nan() -> None:
    """Whether its numbers are any good is found out when it answers."""
    model = random_model(FAMILIES["llama"].config())
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    assert ModelGeometry.from_model(model).immovable is None
