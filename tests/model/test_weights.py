"""The identity of weights: the same for the same numbers, another one for any difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from kvcomm.errors import UnsupportedModel
from kvcomm.model.weights import config_settings, weights_digest
from tests.tiny import TinyModel, tiny_llama, tiny_model


def test_equal_models_have_one_identity(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path)

    assert weights_digest(tiny.model) == weights_digest(tiny_model().model) == weights_digest(reloaded)


def negate_one_number(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= -1


def swap_two_tensors(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj, layer.gate_proj = layer.gate_proj, layer.up_proj


def change_rope(model: LlamaForCausalLM) -> None:
    model.config.rope_parameters["rope_theta"] *= 2


def cast(model: LlamaForCausalLM) -> None:
    model.to(torch.bfloat16)


def reshape(model: LlamaForCausalLM) -> None:
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.data.view(1, -1))


def add_buffer(model: LlamaForCausalLM) -> None:
    model.register_buffer("scales", torch.ones(1))


@pytest.mark.parametrize("change", [negate_one_number, swap_two_tensors, change_rope, cast, reshape, add_buffer])
def test_every_difference_counts(change: Callable[[LlamaForCausalLM], None], tiny: TinyModel) -> None:
    before = weights_digest(tiny.model)
    change(tiny.model)

    assert weights_digest(tiny.model) != before


def test_names_and_dtypes_count_with_equal_bytes(tiny: TinyModel) -> None:
    """A number means something else in bfloat16 than in float16, and a scale something else than a shift."""
    digests = set()
    for name, dtype in (("scale", torch.float16), ("scale", torch.bfloat16), ("shift", torch.float16)):
        tiny.model.register_buffer(name, torch.ones(4, dtype=torch.float16).view(dtype))
        digests.add(weights_digest(tiny.model))
        delattr(tiny.model, name)

    assert len(digests) == 3


def test_layout_in_memory_does_not_count(tiny: TinyModel) -> None:
    before = weights_digest(tiny.model)
    projection = tiny.model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.data.t().contiguous().t())

    assert not projection.weight.is_contiguous()
    assert weights_digest(tiny.model) == before


def test_tied_weights_are_told_from_copies_by_the_config_only() -> None:
    """A tied tensor is read once, and counts under each of its names."""
    untied = tiny_llama(vocab_size=300)
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight.data)
    tied = tiny_llama(vocab_size=300)
    tied.lm_head.weight = tied.model.embed_tokens.weight

    assert weights_digest(tied) == weights_digest(untied)


def test_paths_versions_and_implementations_do_not_count(tiny: TinyModel) -> None:
    before = config_settings(tiny.model.config)
    tiny.model.config._name_or_path = "elsewhere"
    tiny.model.config.transformers_version = "0"
    tiny.model.config.use_cache = False
    tiny.model.set_attn_implementation("eager")

    assert config_settings(tiny.model.config) == before
    assert before["rope_parameters"]["rope_theta"] == 10000.0


def test_weights_that_are_not_in_memory() -> None:
    with torch.device("meta"):
        model = tiny_llama(vocab_size=300)

    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM: the bytes of model\.embed_tokens\.weight"):
        weights_digest(model)
