"""Small LoRAs for the tiny model, different enough that every answer shows which of them computed it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from tests.tiny import tiny_model

TARGETS = ("q_proj", "v_proj", "down_proj")


def lora_config(**settings: object) -> LoraConfig:
    """Of rank 4, in three of seven projections."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), **settings})


def fill(model: nn.Module, name: str, *, seed: int) -> None:
    """Give an adapter random numbers: fresh ones do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for path, tensor in sorted(model.named_parameters()):
        if f".{name}." in path or path.endswith(f".{name}"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def with_adapters(model: LlamaForCausalLM, *names: str, **settings: object) -> PeftModel:
    """The model wrapped by PEFT, with these adapters, the first one active; in evaluation mode."""
    wrapped = get_peft_model(model, lora_config(**settings), adapter_name=names[0])
    assert isinstance(wrapped, PeftModel)
    for name in names[1:]:
        wrapped.add_adapter(name, lora_config(**settings))
    for seed, name in enumerate(names, start=1):
        fill(wrapped, name, seed=seed)
    return wrapped.eval()


def save_lora(folder: Path, *, seed: int, **settings: object) -> Path:
    """Save an adapter for the tiny model as PEFT does."""
    wrapped = get_peft_model(tiny_model().model, lora_config(**settings))
    fill(wrapped, "default", seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base model's config on disk
        wrapped.save_pretrained(folder)
    return folder


def greedy(model: nn.Module, token_ids: list[int], num_tokens: int) -> list[int]:
    """The stock forward's greedy answer, one whole pass for each token; ends as the tiny model's answers do."""
    found: list[int] = []
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([token_ids + found]), use_cache=False).logits
        found.append(int(logits[0, -1].argmax()))
    return found
