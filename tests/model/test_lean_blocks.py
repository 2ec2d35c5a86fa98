"""Which blocks of which decoders are known, and that passes over them are the stock forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from kvcomm.model.attention import hook
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.choice import FIXED, ProductChoice
from kvcomm.model.families import random_model
from kvcomm.model.lean import TOLERANCE, LeanLayers, find_blocks, lean_attention, lean_mlp
from kvcomm.model.linear import CANDIDATES
from kvcomm.model.tiles import are_there
from tests.model.architectures import FAMILIES

KNOWN = {
    "llama": {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm"},
    "llama3-rope": {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm"},
    "mistral": {"MistralAttention", "MistralMLP", "MistralRMSNorm"},
    "qwen2": {"Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"},
    "qwen3": {"Qwen3MLP", "Qwen3RMSNorm"},  # its heads are normed
    "gemma": {"GemmaAttention"},  # its norms add one to the weight, its gate is another
    "cohere": {"CohereMLP"},  # its channels are paired with their neighbours
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", KNOWN)
def test_blocks_that_are_known(family: str, exact: bool) -> None:
    blocks = find_blocks(random_model(FAMILIES[family].config()), ProductChoice(), exact=exact)
    assert {type(block.layer).__name__ for block in blocks} == KNOWN[family]


@pytest.mark.parametrize("num_rows", [5, 70])
@pytest.mark.parametrize("up_to_rounding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_the_stock_forward(family: str, up_to_rounding: bool, num_rows: int) -> None:
    """Whatever a decoder is made of; a long whole prompt to the last bit."""
    model = random_model(FAMILIES[family].config())
    hook.register()
    token_ids = torch.arange(num_rows)[None] % 90 + 3
    with torch.inference_mode():
        expected = model(token_ids, use_cache=False).logits
        layers = LeanLayers(model)
        with layers.switched(num_rows, up_to_rounding=up_to_rounding):
            got = model(token_ids, use_cache=False).logits
    if num_rows == 70 and not up_to_rounding:
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


PRODUCTS = [(dtype, name) for dtype, names in CANDIDATES.items() for name in names]
"""By some, the outputs of layers that read the same rows lie in one tensor, by others in one each."""


def choice(dtype: torch.dtype, name: str) -> ProductChoice:
    if name == "tiles" and not are_there():
        pytest.skip("this processor has no tiles for bfloat16")
    return ProductChoice((name,) * len(FIXED[dtype]))


@pytest.mark.parametrize(("dtype", "name"), PRODUCTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_attention_of_a_pass_asks_the_step_for_what_the_stock_layer_asks(
    family: str, dtype: torch.dtype, name: str
) -> None:
    model = random_model(FAMILIES[family].config()).to(dtype)
    hook.register()
    layer = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    forward = lean_attention(model, layer, choice(dtype, name), exact=False)
    assert forward is not None
    geometry = FAMILIES[family]
    storage = [torch.zeros(64, geometry.num_kv_heads, geometry.head_dim, dtype=dtype) for _ in range(2)]
    tables = [RunTable(np.arange(4, dtype=np.int32), 0, 50)]
    rows = torch.randn(1, 50, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    angles = model.model.rotary_emb(rows, torch.arange(50)[None])
    outs, stored = [], []
    with torch.inference_mode(), hook.switched(hook.configs_of(model)):
        for compute in (forward, lambda **keywords: type(layer).forward(layer, **keywords)):
            keys, values = storage[0].clone(), storage[1].clone()
            step = TorchBackend().prepare(tables, [keys], [values], 16)
            keywords = {hook.STEP_KEYWORD: step}
            outs.append(compute(hidden_states=rows, position_embeddings=angles, attention_mask=None, **keywords)[0])
            stored.append(torch.stack([keys, values]))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(stored[0], stored[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outs[0], outs[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "name"), PRODUCTS)
def test_an_mlp_is_the_stock_layer_by_every_product(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(4)
    config = FAMILIES["llama"].config()
    config.hidden_size, config.intermediate_size = 64, 96  # whole tiles
    layer = LlamaMLP(config).to(dtype)
    forward = lean_mlp(layer, choice(dtype, name), exact=False)
    assert forward is not None
    rows = torch.randn(1, 21, layer.hidden_size).to(dtype)
    with torch.inference_mode():
        got, expected = forward(rows), layer(rows)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_an_mlp_of_another_formula_is_left_alone() -> None:
    class Squared(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.001

    config = FAMILIES["llama"].config()
    assert lean_mlp(LlamaMLP(config), ProductChoice(), exact=False) is not None
    assert lean_mlp(Squared(config), ProductChoice(), exact=False) is None


def test_attention_that_scales_queries_is_left_alone() -> None:
    class Scaled(LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, **keywords: object) -> object:
            return super().forward(hidden_states * 1.01, **keywords)

    model = random_model(FAMILIES["llama"].config())
    hook.register()
    config = model.config
    assert lean_attention(model, LlamaAttention(config, 0), ProductChoice(), exact=False) is not None
    assert lean_attention(model, Scaled(config, 0), ProductChoice(), exact=False) is None
    assert lean_attention(model, CohereAttention(FAMILIES["cohere"].config(), 0), ProductChoice(), exact=False) is None


def test_a_hook_within_a_block_is_called() -> None:
    model = random_model(FAMILIES["llama"].config())
    layers = LeanLayers(model)
    seen: list[object] = []
    mlp = next(module for module in model.modules() if isinstance(module, LlamaMLP))
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(None))
    with torch.inference_mode(), layers.switched(5):
        assert "forward" not in vars(mlp)
        model(torch.arange(5)[None])
    handle.remove()
    assert seen == [None]


def test_training_meanwhile_goes_the_stock_way() -> None:
    model: nn.Module = random_model(FAMILIES["llama"].config()).requires_grad_(True)
    layers = LeanLayers(model)
    with layers.switched(5):
        model(torch.arange(5)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
