"""A tokenizer and a Llama small enough to make in every test run, with no file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "You are a helpful agent. Question: how many apples are left? Answer: three apples are left.",
    "The quick brown fox jumps over the lazy dog; the dog does not mind.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyModel(NamedTuple):
    """A random model and a tokenizer whose every id it knows."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens: any text encodes and decodes unchanged. ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    endoftext, im_start, im_end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=im_start,
        eos_token=im_end,
        pad_token=im_end,
        unk_token=endoftext,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(*, vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A random two-layer Llama with grouped heads, float32, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        # Large enough that logits differ clearly between tokens.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_model(*, seed: int = 0) -> TinyModel:
    """A fresh pair; the caller may change it."""
    tokenizer = tiny_tokenizer()
    return TinyModel(tiny_llama(vocab_size=len(tokenizer), seed=seed), tokenizer)


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Save a fresh pair with room for 8,192 tokens as a folder that loads like any other."""
    tiny = tiny_model(seed=seed)
    tiny.model.config.max_position_embeddings = 8192
    logging.disable_progress_bar()
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    logging.enable_progress_bar()
    return folder
