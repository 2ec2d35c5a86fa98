"""Lean layers against the layers they stand in for, and that they are back in place after a pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcomm.model import lean
from kvcomm.model.lean import MAX_ROWS, LeanLayers, few_rows_product, lean_linear, lean_norm, linear_by_onednn


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
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row counts of the products of layers that were compiled loops."""
    seen: list[int] = []

    def counting(rows: Tensor, weight: Tensor) -> Tensor:
        if weight.numel() > 1:  # else it is the trial that compiles the loop
            seen.append(rows.shape[:-1].numel())
        return few_rows_product(rows, weight)

    monkeypatch.setattr(lean, "few_rows_product", counting)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", range(1, 71))
def test_the_product_is_as_near_to_the_exact_one_as_the_stock_product(num_rows: int, bias: bool) -> None:
    layer, rows = linear(bias=bias), random(num_rows, 24)
    with torch.inference_mode():
        exact = functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
        stock, out = layer(rows), lean_linear(layer)(rows)
    assert (out.shape, out.dtype) == (stock.shape, stock.dtype)
    assert float((out - exact).abs().max()) <= 2 * float((stock - exact).abs().max()) + 1e-5


@pytest.mark.parametrize("shape", [(1, 9, 24), (3, 3, 24), (2, 2, 2, 24), (1, 0, 24)])
def test_the_product_keeps_leading_sizes(shape: tuple[int, ...]) -> None:
    layer, rows = linear(), random(*shape)
    with torch.inference_mode():
        out = lean_linear(layer)(rows)
        torch.testing.assert_close(out, layer(rows), rtol=1e-5, atol=1e-5)
    assert out.shape == (*shape[:-1], 40)


@pytest.mark.parametrize("num_out", [1, 2, 3, 4, 5, 7, 41])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 13, 18])
@pytest.mark.parametrize("num_in", [1, 33])
def test_sizes_that_fill_no_tile_are_taken(num_rows: int, num_in: int, num_out: int) -> None:
    rows, weight = random(num_rows, num_in), random(num_out, num_in, seed=1)
    torch.testing.assert_close(few_rows_product(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)


def test_strided_rows_and_weights_are_taken() -> None:
    rows, weight = random(24, 12).t()[::2], random(24, 40, seed=1).t()
    torch.testing.assert_close(few_rows_product(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_stays_so() -> None:
    rows, weight = random(3, 24), random(40, 24, seed=1)
    rows[1, 5], weight[7, 3] = float("nan"), float("inf")
    torch.testing.assert_close(few_rows_product(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("num_rows", "is_compiled"), [(1, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)])
def test_only_few_rows_are_computed_by_the_loop(calls: list[int], num_rows: int, is_compiled: bool) -> None:
    layer = linear()
    with torch.inference_mode(), LeanLayers(layer).switched(num_rows):
        layer(random(num_rows, 24))
    assert calls == [num_rows] * is_compiled


def test_who_wants_gradients_gets_them_meanwhile(calls: list[int]) -> None:
    """Another thread may train the model during a pass."""
    layer = linear()
    with LeanLayers(layer).switched(8):
        layer(random(8, 24)).sum().backward()
    assert layer.weight.grad is not None
    assert calls == []


def test_rows_that_are_parameters_get_the_stock_product(calls: list[int]) -> None:
    """Another thread may ask for trained rows, a soft prompt, during a pass."""
    layer, rows = linear(), nn.Parameter(random(8, 24))
    with torch.inference_mode(), LeanLayers(layer).switched(8):
        assert torch.equal(layer(rows), functional.linear(rows, layer.weight, layer.bias))
    assert calls == []


def test_more_rows_from_elsewhere_get_the_stock_product(calls: list[int]) -> None:
    """Another thread may prefill with the model during a pass of few rows."""
    layer, rows = linear(), random(MAX_ROWS + 1, 24)
    with torch.inference_mode(), LeanLayers(layer).switched(8):
        assert torch.equal(layer(rows), functional.linear(rows, layer.weight, layer.bias))
    assert calls == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [MAX_ROWS + 1, 271, 2048])
def test_many_rows_by_onednn_are_as_near_to_the_exact_product_as_one_sum(num_rows: int, bias: bool) -> None:
    """As adding products one after the other in float32; MKL, which adds them in parts, errs half as much."""
    layer, rows = linear(576, 40, bias=bias), random(num_rows, 576)
    with torch.inference_mode():
        exact = functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
        summed = torch.zeros(num_rows, 40)
        for place in range(576):
            summed += rows[:, place, None] * layer.weight[:, place]
        summed += layer.bias if bias else 0
        out = linear_by_onednn(rows[None], layer.weight, layer.bias)
    assert (out.shape, out.dtype) == ((1, num_rows, 40), torch.float32)
    assert float((out[0] - exact).abs().max()) <= 1.1 * float((summed - exact).abs().max())


def test_onednn_takes_strided_rows_and_weights() -> None:
    rows, weight = random(2, 100, 96)[..., ::2], random(80, 96, seed=1)[::2, ::2]
    for one, other in ((rows, weight), (rows.contiguous(), weight.t().contiguous().t())):
        with torch.inference_mode():
            torch.testing.assert_close(linear_by_onednn(one, other, None), one @ other.t(), rtol=1e-5, atol=1e-5)


def test_many_rows_are_the_stock_product_unless_rounding_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = linear(), random(MAX_ROWS + 1, 24)
    layers, seen = LeanLayers(layer), []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: seen.append(1) or False)
    with torch.inference_mode():
        for up_to_rounding in (False, True):
            with layers.switched(len(rows), up_to_rounding=up_to_rounding):
                assert torch.equal(layer(rows), functional.linear(rows, layer.weight, layer.bias))
            assert bool(seen) == up_to_rounding


def test_the_few_logits_of_a_pass_of_many_rows_are_computed_by_the_loop(calls: list[int]) -> None:
    """MKL took 34 ms for what 28 answers needed of a vocabulary of 49,152, a twentieth of the pass."""
    layer = linear()
    with torch.inference_mode(), LeanLayers(layer).switched(300, up_to_rounding=True):
        torch.testing.assert_close(layer(random(28, 24)), functional.linear(random(28, 24), layer.weight, layer.bias))
    assert calls == [28]


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (1, 300, 24), (1, 7, 3, 24)])
def test_a_norm_is_the_same_to_the_last_bit(shape: tuple[int, ...]) -> None:
    layer, rows = norm(), random(*shape) * 50
    before = rows.clone()
    forward = lean_norm(layer)
    assert forward is not None
    with torch.inference_mode():
        assert torch.equal(forward(rows), layer(rows))
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
    layer, rows = norm(), random(1, 7, 24).bfloat16()
    with torch.inference_mode():
        expected = layer(rows)
        with LeanLayers(layer).switched(7):
            got = layer(rows)
    assert (got.dtype, torch.equal(got, expected)) == (expected.dtype, True)


def test_looking_for_norms_calls_no_hook() -> None:
    layer = norm()
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append(None))
    LeanLayers(layer)
    assert calls == []


@pytest.mark.parametrize(
    "make",
    [
        GatedRMSNorm,
        BufferRMSNorm,
        Gemma3RMSNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        lambda size: nn.GroupNorm(4, size),
        lambda size: linear(size),
    ],
)
def test_norms_of_another_form_are_left_alone(make: Callable[[int], nn.Module]) -> None:
    layer = make(24)
    layers = LeanLayers(layer)
    before = layer.forward
    with layers.switched(1000):
        assert layer.forward == before


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


def test_layers_are_their_own_again_after_the_block(calls: list[int]) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(calls: list[int], dtype: torch.dtype) -> None:
    model = nn.Sequential(norm(), linear()).to(dtype)
    with torch.inference_mode(), LeanLayers(model).switched(8):
        assert not any("forward" in vars(layer) for layer in model)
