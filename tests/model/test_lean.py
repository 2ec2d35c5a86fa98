"""Lean layers against the layers they stand in for, and that they are back in place after a pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcomm.model import linear as products
from kvcomm.model.choice import ProductChoice
from kvcomm.model.lean import MAX_ROWS, LeanLayers
from kvcomm.model.linear import PRODUCTS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(num_in: int = 24, num_out: int = 40, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(random(num_out, num_in, seed=1))
        if bias:
            layer.bias.copy_(random(num_out, seed=2))
    return layer


def norm(size: int = 24, make: Callable[[int], nn.Module] = LlamaRMSNorm) -> nn.Module:
    layer = make(size)
    with torch.no_grad():
        layer.weight.copy_(random(size, seed=3))
    return layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and row counts of the products that passes asked for."""
    seen: list[tuple[str, int]] = []

    def counting(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((name, len(rows)))
        return PRODUCTS[name](rows, weight, bias)

    monkeypatch.setattr(products, "product", counting)
    return seen


@pytest.mark.parametrize("num_rows", [1, 8, 16, MAX_ROWS, 64, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_the_stock_one_up_to_rounding(num_rows: int, bias: bool) -> None:
    layer, rows = linear(bias=bias), random(2, num_rows, 24)
    with torch.inference_mode():
        expected = layer(rows)
        with LeanLayers(layer).switched(2 * num_rows, up_to_rounding=True):
            torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)


def test_what_is_chosen_is_what_computes(calls: list[tuple[str, int]]) -> None:
    table = ("blocks", "outputs", "onednn", "torch", "blocks", "outputs", "torch", "onednn", "torch")
    layer = linear()
    with torch.inference_mode(), LeanLayers(layer, ProductChoice(table)).switched(8):
        for num_rows in (1, 3, 8, 9, 32, 64, 65, 256, 1000):
            layer(random(num_rows, 24))
    assert calls == [*zip(table, (1, 3, 8, 9, 32, 64, 65, 256, 1000), strict=True)]


def test_many_rows_are_the_stock_product_unless_rounding_may_differ(calls: list[tuple[str, int]]) -> None:
    layer, rows = linear(), random(MAX_ROWS + 1, 24)
    layers = LeanLayers(layer)
    with torch.inference_mode():
        for up_to_rounding in (False, True):
            with layers.switched(len(rows), up_to_rounding=up_to_rounding):
                layer(rows)
            assert bool(calls) == up_to_rounding


def test_who_wants_gradients_gets_them_meanwhile(calls: list[tuple[str, int]]) -> None:
    """Another thread may train the model during a pass."""
    layer = linear()
    with LeanLayers(layer).switched(8):
        layer(random(8, 24)).sum().backward()
    assert layer.weight.grad is not None
    assert calls == []


def test_rows_that_are_parameters_get_the_stock_product(calls: list[tuple[str, int]]) -> None:
    """Another thread may ask for trained rows, a soft prompt, during a pass."""
    layer, rows = linear(), nn.Parameter(random(8, 24))
    with torch.inference_mode(), LeanLayers(layer).switched(8):
        assert torch.equal(layer(rows), functional.linear(rows, layer.weight, layer.bias))
    assert calls == []


def test_no_rows_give_no_outputs() -> None:
    layer = linear()
    with torch.inference_mode(), LeanLayers(layer).switched(8):
        assert layer(random(1, 0, 24)).shape == (1, 0, 40)


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (1, 300, 24), (1, 7, 3, 24)])
def test_a_norm_in_a_whole_prompt_is_the_same_to_the_last_bit(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(norm(), linear())
    rows = random(*shape) * 50
    before = rows.clone()
    with torch.inference_mode():
        expected = model[0](rows)
        with LeanLayers(model).switched(MAX_ROWS + 1):
            assert "forward" in vars(model[0])
            assert torch.equal(model[0](rows), expected)
        with LeanLayers(model).switched(1):
            torch.testing.assert_close(model[0](rows), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(rows, before)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, rows: Tensor, gate: Tensor) -> Tensor:
        return super().forward(rows) * gate


class BufferRMSNorm(nn.Module):
    """Its weight is no parameter, and not one number per channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.register_buffer("weight", torch.ones(2, size))


def test_a_norm_of_float32_in_a_smaller_model_keeps_its_own_way() -> None:
    """Bug: squares of bfloat16 rows were summed in bfloat16."""
    model, rows = nn.Sequential(norm(), linear()), random(1, 7, 24).bfloat16()
    with torch.inference_mode():
        expected = model[0](rows)
        with LeanLayers(model).switched(7):
            got = model[0](rows)
    assert (got.dtype, torch.equal(got, expected)) == (expected.dtype, True)


def test_looking_for_norms_calls_no_hook() -> None:
    model = nn.Sequential(norm(), linear())
    calls: list[object] = []
    model[0].register_forward_hook(lambda *_: calls.append(None))
    LeanLayers(model)
    assert calls == []


def test_hooked_layers_keep_their_own_way() -> None:
    model = nn.Sequential(norm(), linear())
    layers = LeanLayers(model)
    seen: list[object] = []
    model[0].register_forward_hook(lambda *_: seen.append(None))
    with torch.inference_mode(), layers.switched(8):
        assert "forward" not in vars(model[0])
        model(random(8, 24))
    assert seen == [None]


@pytest.mark.parametrize(
    "make",
    [
        GatedRMSNorm,
        BufferRMSNorm,
        Gemma3RMSNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        lambda size: nn.GroupNorm(4, size),
    ],
)
def test_norms_of_another_form_are_left_alone(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(make(24), linear())
    layers = LeanLayers(model)
    for num_rows in (8, 1000):
        with layers.switched(num_rows):
            assert "forward" not in vars(model[0])


def test_weights_that_change_after_loading_count() -> None:
    model = nn.Sequential(norm(), linear())
    layers = LeanLayers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model[1].weight = nn.Parameter(random(40, 24, seed=9))
    rows = random(8, 24)
    with torch.inference_mode():
        expected = model(rows)
        with layers.switched(8):
            torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_their_own_again_after_the_block(calls: list[tuple[str, int]]) -> None:
    model = nn.Sequential(norm(), linear())
    layers, rows = LeanLayers(model), random(8, 24)
    with torch.inference_mode():
        before = model(rows)
        with layers.switched(8):
            model(rows)
        with pytest.raises(RuntimeError, match="inside"), layers.switched(8):
            raise RuntimeError("inside")
        calls.clear()
        assert torch.equal(model(rows), before)
    assert calls == []
    assert not any("forward" in vars(layer) for layer in model)


@pytest.mark.parametrize("is_later", [False, True])
def test_a_forward_that_somebody_else_laid_over_a_layer_stays(is_later: bool) -> None:
    """As device-mapping libraries do. Bug: one laid over after the engine was made was taken away with ours."""
    model = nn.Sequential(norm(), linear())
    foreign = {layer: (lambda rows: rows + 1) for layer in model}
    layers = LeanLayers(model) if is_later else None
    for layer, forward in foreign.items():
        layer.forward = forward
    with (layers or LeanLayers(model)).switched(8):
        assert all(layer.forward is foreign[layer] for layer in model)
    assert all(layer.forward is foreign[layer] for layer in model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(norm(), linear()).to(dtype)
    with torch.inference_mode(), LeanLayers(model).switched(8):
        assert not any("forward" in vars(layer) for layer in model)


def test_bfloat16_is_lean_in_whole_prompts_as_well() -> None:
    model, rows = nn.Sequential(norm(), linear()).bfloat16(), random(70, 24).bfloat16()
    with torch.inference_mode():
        expected = model(rows)
        with LeanLayers(model).switched(70):
            assert all("forward" in vars(layer) for layer in model)
            torch.testing.assert_close(model(rows), expected, rtol=2e-2, atol=2e-2)
