"""The families of decoders that transformers has, each as a tiny model with random weights: to try what holds for it.

Which families there are is transformers' to say. A family is left out where its text model is not the whole model (it
also sees images, or wraps a text family that is listed by itself), or where it decodes only beside or as an encoder.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 260
NUM_LAYERS = 3
WINDOW = 24
"""Tokens; small beside the prompts that families are tried with."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings by the names that configs have for them."""

OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": WINDOW},
    # Layers that take keys and values from others, fewer than by default.
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_text": {"num_kv_shared_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
}
"""What a family needs besides, by the name of its type."""


def families() -> dict[str, str]:
    """Names of families, sorted, as in a config's `model_type`, and the class of each one's model."""
    found = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    return {name: str(model) for name, model in found if _is_plain(name, CONFIG_MAPPING[name])}


def tiny_config(name: str) -> PreTrainedConfig:
    """A config of a family with a few small layers, of every kind that its own default has.

    Raises:
        KeyError: there is no such family.
        Exception: it cannot be made that small; what its class raises.
    """
    cls = CONFIG_MAPPING[name]
    known = {each.name for each in fields(cls)} - set(cls.attribute_map)
    settings = {key: value for key, value in SIZES.items() if key in known} | OTHER_SIZES.get(name, {})
    if "layer_types" in known and "layer_types" not in settings:
        kinds = list(dict.fromkeys(cls().layer_types or ()))
        if kinds:
            settings["layer_types"] = [kinds[index % len(kinds)] for index in range(NUM_LAYERS)]
    return cls(**settings)


def random_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode: large random weights, logits spread by about 1, its own attention by default.

    Weights are large so that every visible token changes the logits far more than rounding does.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().float()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(8)
            elif name.endswith("sinks"):
                weight.normal_()
        head = model.get_output_embeddings()
        vocab_size = head.weight.shape[0]
        logits = model(input_ids=torch.randint(3, vocab_size, (1, 32)), use_cache=False).logits
        head.weight.div_(logits.std())
    return model


def _is_plain(name: str, config: type[PreTrainedConfig]) -> bool:
    """Whether it is a decoder alone, and no other name of one; by the defaults of its config's class."""
    is_encoder = getattr(config, "is_decoder", None) is False
    is_part = config.sub_configs or getattr(config, "is_encoder_decoder", False)
    return config.model_type == name and not is_encoder and not is_part
