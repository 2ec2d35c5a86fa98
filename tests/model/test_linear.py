"""Every product against the exact one, and that tiles compute a row the same whatever rows come with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kvcomm.model.choice import ProductChoice
from kvcomm.model.linear import CANDIDATES, TileProduct, can_compute, product
from kvcomm.model.tiles import are_there

ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
PAIRS = [(dtype, name) for dtype, names in CANDIDATES.items() for name in names]
needs_tiles = pytest.mark.skipif(not are_there(), reason="this processor has no tiles")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_near(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """As near to the exact product as float32 sums, rounded to the dtype at most twice (a bias may be added after)."""
    exact = functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    size = rows.double().abs() @ weight.double().abs().t()
    limit = 1e-5 * size + 1.5 * ULP[out.dtype] * (exact.abs() + (0 if bias is None else size.sqrt())) + 1e-6
    assert out.dtype == rows.dtype
    assert bool(((out.double() - exact).abs() <= limit).all())


@given(
    pair=st.sampled_from(PAIRS),
    num_rows=st.integers(1, 70),
    num_out=st.integers(1, 100),
    num_in=st.sampled_from([1, 32, 33, 64, 96]),
    bias=st.booleans(),
)
def test_every_product_is_near_the_exact_one(
    pair: tuple[torch.dtype, str], num_rows: int, num_out: int, num_in: int, bias: bool
) -> None:
    dtype, name = pair
    rows, weight = random(num_rows, num_in, dtype=dtype), random(num_out, num_in, seed=1, dtype=dtype)
    added = random(num_out, seed=2, dtype=dtype) if bias else None
    if can_compute(name, weight):
        with torch.inference_mode():
            require_near(product(name, rows, weight, added), rows, weight, added)


@pytest.mark.parametrize("name", CANDIDATES[torch.float32])
def test_strided_rows_and_weights_are_taken(name: str) -> None:
    rows, weight = random(24, 12).t()[::2], random(24, 40, seed=1).t()
    with torch.inference_mode():
        torch.testing.assert_close(product(name, rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "name"), PAIRS)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype, name: str) -> None:
    rows, weight = random(3, 32, dtype=dtype), random(40, 32, seed=1, dtype=dtype)
    rows[1, 5], weight[7, 3] = float("nan"), float("inf")
    if can_compute(name, weight):
        with torch.inference_mode():
            got, expected = product(name, rows, weight), rows @ weight.t()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@needs_tiles
def test_a_row_is_the_same_whatever_rows_come_with_it() -> None:
    rows, weight = random(130, 96, dtype=torch.bfloat16), random(72, 96, seed=1, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = product("tiles", rows, weight)
        for start, end in ((0, 1), (5, 9), (60, 130), (129, 130)):
            assert torch.equal(product("tiles", rows[start:end], weight), whole[start:end])


@needs_tiles
def test_weights_side_by_side_are_their_products_side_by_side() -> None:
    rows = random(20, 64, dtype=torch.bfloat16)
    weights = [random(num_out, 64, seed=num_out, dtype=torch.bfloat16) for num_out in (32, 70, 33)]
    bias = random(135, seed=5)
    with torch.inference_mode():
        alone = [
            product("tiles", rows, weight, part.bfloat16())
            for weight, part in zip(weights, bias.bfloat16().split([32, 70, 33]), strict=True)
        ]
        together = TileProduct()(rows, weights, bias.bfloat16().float().numpy())
    assert torch.equal(together, torch.cat(alone, 1))


@needs_tiles
def test_tiles_follow_weights_that_are_exchanged() -> None:
    compute, rows = TileProduct(), random(4, 32, dtype=torch.bfloat16)
    for seed in range(3):
        weight = random(32 + seed, 32, seed=seed, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(compute(rows, [weight], None), product("tiles", rows, weight))


@pytest.mark.parametrize("dtype", CANDIDATES)
def test_joined_layers_are_the_layers_side_by_side(dtype: torch.dtype) -> None:
    layers = [nn.Linear(64, num_out, bias=num_out != 40) for num_out in (40, 33, 64)]
    rows = random(9, 64, dtype=dtype)
    with torch.inference_mode():
        for layer in layers:
            layer.to(dtype)
        expected = torch.cat([layer(rows) for layer in layers], 1)
        out = torch.cat(ProductChoice().joined(layers)(rows), 1)
    torch.testing.assert_close(out, expected, rtol=2 * ULP[dtype], atol=2 * ULP[dtype])


@pytest.mark.parametrize("num_rows", [1, 9, 300])
def test_layers_that_were_given_another_dtype_since_they_were_joined_are_the_stock_ones(num_rows: int) -> None:
    layers = [nn.Linear(64, num_out) for num_out in (40, 64)]
    compute, rows = ProductChoice().joined(layers), random(num_rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = [layer.bfloat16()(rows) for layer in layers]
        assert all(map(torch.equal, compute(rows), expected))


def test_rounding_is_to_the_nearest_even() -> None:
    """Of sums that lie halfway between two numbers of bfloat16, and of what is no number."""
    rows = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [float("inf"), 0.0], [float("nan"), 0.0]]).bfloat16()
    weight = torch.ones(1, 2).bfloat16()
    with torch.inference_mode():
        out = product("outputs", rows, weight)
    expected = torch.tensor([[1.0], [1.0 + 2**-6], [np.inf], [np.nan]]).bfloat16()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
