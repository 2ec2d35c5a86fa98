"""The transposed product against `functional.linear`, and that nothing outside its block sees it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model import skinny
from kvcomm.model.skinny import MAX_ROWS, MIN_ROWS, SkinnyLinear, skinny_linear, transposed_linear

CPU = torch.device("cpu")


def operands(num_rows: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 24, generator=generator)
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    return rows.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row counts of the products that were transposed."""
    seen: list[int] = []

    def counting(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(rows.numel() // rows.shape[-1])
        return transposed_linear(rows, weight, bias)

    monkeypatch.setattr(skinny, "transposed_linear", counting)
    return seen


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", range(1, 71))
def test_equals_the_exact_product_as_closely_as_linear_does(num_rows: int, has_bias: bool) -> None:
    rows, weight, bias = operands(num_rows)
    exact = functional.linear(rows.double(), weight.double(), bias.double() if has_bias else None)
    stock = functional.linear(rows, weight, bias if has_bias else None)
    with SkinnyLinear():
        out = functional.linear(rows, weight, bias if has_bias else None)
    assert (out.shape, out.dtype) == (stock.shape, stock.dtype)
    assert float((out - exact).abs().max()) <= 2 * float((stock - exact).abs().max()) + 1e-5


@pytest.mark.parametrize("shape", [(1, 9, 24), (3, 3, 24), (2, 2, 2, 24)])
def test_keeps_leading_sizes_and_gives_contiguous_rows(shape: tuple[int, ...]) -> None:
    _, weight, bias = operands(1)
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with SkinnyLinear():
        out = functional.linear(rows, weight, bias)
    assert out.shape == (*shape[:-1], 40)
    assert out.is_contiguous()
    torch.testing.assert_close(out, functional.linear(rows, weight, bias), rtol=1e-5, atol=1e-5)


def test_strided_rows_and_weights_are_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 12, generator=generator).t()[::2]
    weight = torch.randn(24, 40, generator=generator).t()
    with SkinnyLinear():
        out = functional.linear(rows, weight)
    torch.testing.assert_close(out, functional.linear(rows, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_rows", "is_transposed"),
    [(1, False), (MIN_ROWS - 1, False), (MIN_ROWS, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)],
)
def test_only_few_rows_are_transposed(calls: list[int], num_rows: int, is_transposed: bool) -> None:
    rows, weight, bias = operands(num_rows)
    with SkinnyLinear():
        nn.functional.linear(rows, weight, bias)
    assert calls == [num_rows] * is_transposed


def test_modules_of_a_model_are_reached(calls: list[int]) -> None:
    layer = nn.Linear(24, 40)
    rows, _, _ = operands(8)
    with torch.inference_mode(), SkinnyLinear():
        out = layer(rows)
    assert calls == [8]
    torch.testing.assert_close(out, layer(rows).detach(), rtol=1e-5, atol=1e-5)


def test_nothing_changes_outside_the_block(calls: list[int]) -> None:
    rows, weight, bias = operands(8)
    before = functional.linear(rows, weight, bias)
    with skinny_linear(8, CPU, torch.float32):
        functional.linear(rows, weight, bias)
    assert len(calls) <= 1
    calls.clear()
    assert torch.equal(functional.linear(rows, weight, bias), before)
    with pytest.raises(RuntimeError, match="inside"), skinny_linear(8, CPU, torch.float32):
        raise RuntimeError("inside")
    assert torch.equal(functional.linear(rows, weight, bias), before)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone_even_inside_the_block(calls: list[int], dtype: torch.dtype) -> None:
    rows, weight, bias = operands(8, dtype=dtype)
    expected = functional.linear(rows, weight, bias)
    with SkinnyLinear():
        assert torch.equal(functional.linear(rows, weight, bias), expected)
    assert calls == []


def test_other_threads_are_left_alone(calls: list[int]) -> None:
    rows, weight, bias = operands(8)
    results: list[Tensor] = []
    with SkinnyLinear():
        thread = threading.Thread(target=lambda: results.append(functional.linear(rows, weight, bias)))
        thread.start()
        thread.join()
    assert calls == []
    assert torch.equal(results[0], functional.linear(rows, weight, bias))


@pytest.mark.parametrize(
    ("num_tokens", "device", "dtype"),
    [
        (MIN_ROWS - 1, "cpu", torch.float32),
        (MAX_ROWS + 1, "cpu", torch.float32),
        (8, "cpu", torch.bfloat16),
        (8, "meta", torch.float32),
    ],
)
def test_the_override_is_off_where_it_does_not_pay(
    calls: list[int], num_tokens: int, device: str, dtype: torch.dtype
) -> None:
    rows, weight, bias = operands(8)
    with skinny_linear(num_tokens, torch.device(device), dtype):
        functional.linear(rows, weight, bias)
    assert calls == []


def test_the_override_is_on_where_it_pays(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    rows, weight, bias = operands(8)
    with skinny_linear(8, CPU, torch.float32):
        functional.linear(rows, weight, bias)
    assert calls == [8]
