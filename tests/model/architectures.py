"""Tiny random-weight decoders, one per family the runner must hold for, and what their geometry is known to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import transformers as tf

from kvcomm.model.families import random_model

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 24


class Family(NamedTuple):
    """A tiny config and what the family's documentation says about its keys.

    Attributes:
        rotary_dims: rotated channels of each layer's keys; None: the layer has no rope.
        windows: sliding window of each layer.
        moves: whether keys follow the position by a rotation (or not at all).
        softcap, has_sinks: as in `LayerGeometry`, of every layer.
    """

    config: Callable[[], Any]
    num_kv_heads: int = 2
    head_dim: int = 12
    rotary_dims: tuple[int | None, ...] = (12, 12, 12)
    kind: str = "default"
    interleaved: bool = False
    windows: tuple[int | None, ...] = (None, None, None)
    moves: bool = True
    softcap: float | None = None
    has_sinks: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: tf.LlamaConfig(**GROUPED)),
    "llama-multi-query": Family(lambda: tf.LlamaConfig(**SIZES, num_key_value_heads=1), num_kv_heads=1),
    "llama3-rope": Family(lambda: tf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE), kind="llama3"),
    "yarn-rope": Family(lambda: tf.LlamaConfig(**GROUPED, rope_parameters=YARN_ROPE), kind="yarn"),
    "linear-rope": Family(lambda: tf.LlamaConfig(**GROUPED, rope_parameters=LINEAR_ROPE), kind="linear"),
    "mistral": Family(lambda: tf.MistralConfig(**GROUPED, sliding_window=WINDOW), windows=(WINDOW,) * 3),
    "mixtral": Family(lambda: tf.MixtralConfig(**GROUPED, **EXPERTS)),
    "gemma": Family(lambda: tf.GemmaConfig(**GROUPED, head_dim=16), head_dim=16, rotary_dims=(16,) * 3),
    "gemma3": Family(
        lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=LAYER_TYPES),
        head_dim=16,
        rotary_dims=(16,) * 3,
        windows=(WINDOW, None, WINDOW),
    ),
    "qwen2": Family(lambda: tf.Qwen2Config(**GROUPED)),
    "qwen2-windows": Family(
        lambda: tf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        windows=(None, WINDOW, WINDOW),
    ),
    "qwen3": Family(lambda: tf.Qwen3Config(**GROUPED, head_dim=16), head_dim=16, rotary_dims=(16,) * 3),
    "qwen3-moe": Family(
        lambda: tf.Qwen3MoeConfig(
            **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        head_dim=16,
        rotary_dims=(16,) * 3,
    ),
    "phi": Family(
        lambda: tf.PhiConfig(**GROUPED, rope_parameters=HALF_ROPE),
        rotary_dims=(6,) * 3,
    ),
    "phi3": Family(lambda: tf.Phi3Config(**GROUPED, rope_parameters=HALF_ROPE), rotary_dims=(6,) * 3),
    "gpt-neox": Family(
        lambda: tf.GPTNeoXConfig(**SIZES | {"hidden_size": 64}), num_kv_heads=4, head_dim=16, rotary_dims=(4,) * 3
    ),
    "cohere": Family(lambda: tf.CohereConfig(**GROUPED), interleaved=True),
    "cohere2": Family(
        lambda: tf.Cohere2Config(**GROUPED, sliding_window=WINDOW, layer_types=LAYER_TYPES),
        rotary_dims=(12, None, 12),
        interleaved=True,
        windows=(WINDOW, None, WINDOW),
    ),
    "glm": Family(lambda: tf.GlmConfig(**GROUPED, head_dim=16), head_dim=16, rotary_dims=(8,) * 3, interleaved=True),
    "smollm3": Family(lambda: tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]), rotary_dims=(12, None, 12)),
    "starcoder2": Family(lambda: tf.Starcoder2Config(**GROUPED, sliding_window=WINDOW), windows=(WINDOW,) * 3),
    "granite": Family(lambda: tf.GraniteConfig(**GROUPED, attention_multiplier=0.3, residual_multiplier=0.5)),
    "gemma2": Family(
        lambda: tf.Gemma2Config(
            **GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=LAYER_TYPES, attn_logit_softcapping=2.0
        ),
        head_dim=16,
        rotary_dims=(16,) * 3,
        windows=(WINDOW, None, WINDOW),
        softcap=2.0,
    ),
    "gpt-oss": Family(
        lambda: tf.GptOssConfig(
            **GROUPED,
            **EXPERTS,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=LAYER_TYPES,
            rope_parameters=dict(YARN_ROPE),
        ),
        head_dim=16,
        rotary_dims=(16,) * 3,
        kind="yarn",
        windows=(WINDOW, None, WINDOW),
        has_sinks=True,
    ),
    "nanochat, which turns the other way round": Family(lambda: tf.NanoChatConfig(**GROUPED)),
    "afmoe": Family(
        lambda: tf.AfmoeConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=LAYER_TYPES,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        head_dim=16,
        rotary_dims=(16, None, 16),
        windows=(WINDOW, None, WINDOW),
    ),
    "olmo2": Family(lambda: tf.Olmo2Config(**GROUPED)),
    "olmo3": Family(
        lambda: tf.Olmo3Config(**GROUPED, sliding_window=WINDOW, layer_types=LAYER_TYPES),
        windows=(WINDOW, None, WINDOW),
    ),
    "gpt2": Family(
        lambda: tf.GPT2Config(
            vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
        num_kv_heads=4,
        rotary_dims=(None,) * 3,
        moves=False,
    ),
}


@cache
def tiny_model(name: str) -> tf.PreTrainedModel:
    """The family's model, the same object in every test; nobody changes it."""
    return random_model(FAMILIES[name].config())
