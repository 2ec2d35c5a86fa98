"""An engine with a tiny random model whose tokens are bytes, float32, on the CPU."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from tests.agents.fakes import byte_tokenizer


def make_engine(*, num_slots: int = 8192, cache: bool = True) -> Engine:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,  # otherwise the untrained model repeats one token
    )
    return Engine(LlamaForCausalLM(config), tokenizer, config=EngineConfig(pool_tokens=num_slots, cache=cache))
