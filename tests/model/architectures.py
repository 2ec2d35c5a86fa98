"""Tiny random-weight decoders, one per family the runner must hold for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "llama3-rope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE),
    "yarn-rope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=YARN_ROPE),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=24),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **GROUPED,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=16),
    "phi3": lambda: tf.Phi3Config(
        **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "glm": lambda: tf.GlmConfig(**GROUPED, head_dim=16),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED, sliding_window=24),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
}


def tiny_model(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A float32 model of the family, random weights, SDPA as its own attention."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa")
    return model.eval().float()
