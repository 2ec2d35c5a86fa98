"""The moving kernel against the reference; collected only by test_triton_ops.py, in a process of its own.

On CPU tensors in Triton's interpreter where TRITON_INTERPRET=1, else on the GPU. Slots of no source are NaN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.contract import LayerStore, Neighbors, Ops, Place
from kvcomm.errors import InvalidRequest
from kvcomm.model.rope import RopeGeometry

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NUM_SLOTS, NUM_HEADS, NUM_ANCHORS = 400, 2, 11
ULPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rope(dim: int, base: float, *, interleaved: bool = False) -> RopeGeometry:
    return RopeGeometry("default", tuple(base ** (-i / dim) for i in range(0, dim, 2)), interleaved=interleaved)


class Shape(NamedTuple):
    """Layers of a model: key and value channels, and a rotation for each layer."""

    key_dim: int
    value_dim: int
    ropes: tuple[RopeGeometry | None, ...]


SHAPES = {
    "halves, other bases per layer": Shape(16, 16, (rope(16, 1e4), rope(16, 1e4), rope(16, 1e6))),
    "interleaved": Shape(16, 16, (rope(16, 1e4, interleaved=True), rope(16, 500, interleaved=True))),
    "partial": Shape(20, 12, (rope(8, 1e4), rope(8, 1e4))),
    "partial and interleaved": Shape(24, 16, (rope(12, 1e4, interleaved=True), rope(12, 1e4, interleaved=True))),
    "no positions": Shape(16, 8, (None, None)),
    "all kinds at once": Shape(32, 32, (rope(32, 1e4), None, rope(16, 1e4), rope(32, 1e4, interleaved=True))),
}


@pytest.fixture(scope="module")
def ops() -> Ops:
    return make_ops("triton", DEVICE)


def stores(shape: Shape, dtype: torch.dtype, source: Place) -> list[LayerStore]:
    """NaN everywhere but in the source's slots."""
    generator = torch.Generator().manual_seed(1)

    def stored(dim: int) -> torch.Tensor:
        values = torch.full((NUM_SLOTS, NUM_HEADS, dim), torch.nan)
        values[source.slots] = torch.randn(source.num_tokens, NUM_HEADS, dim, generator=generator)
        return values.to(dtype).to(DEVICE)

    return [LayerStore(stored(shape.key_dim), stored(shape.value_dim), each) for each in shape.ropes]


def table(shape: Shape) -> OffsetTable:
    """The first layer has no offsets, as in use."""
    generator = torch.Generator().manual_seed(2)

    def rows(dim: int) -> OffsetRows:
        made = OffsetRows.quantize(torch.randn(NUM_ANCHORS, NUM_HEADS, dim, generator=generator))
        return OffsetRows(made.codes.to(DEVICE), made.scales.to(DEVICE))

    count = len(shape.ropes) - 1
    return OffsetTable(
        (None, *(rows(shape.key_dim) for _ in range(count))), (None, *(rows(shape.value_dim) for _ in range(count)))
    )


def neighbors(shape: Shape, num_tokens: int, k: int) -> Neighbors:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, NUM_ANCHORS, (2, num_tokens, k), generator=generator)
    weights = torch.rand(2, num_tokens, k, generator=generator)
    return Neighbors(indices.to(DEVICE), weights.to(DEVICE), tuple(i % 2 for i in range(len(shape.ropes))))


def places(num_tokens: int, *, scattered: bool) -> tuple[Place, Place]:
    if not scattered:
        return Place(slice(3, 3 + num_tokens), 700), Place(slice(200, 200 + num_tokens), 31)
    order = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return Place(order[:num_tokens], 5), Place(order[num_tokens : 2 * num_tokens], 5000)


def assert_same(one: Sequence[LayerStore], other: Sequence[LayerStore], dtype: torch.dtype) -> None:
    for got, wanted in zip(one, other, strict=True):
        for mine, theirs in ((got.keys, wanted.keys), (got.values, wanted.values)):
            scale = 4 * ULPS[dtype]
            torch.testing.assert_close(mine, theirs, atol=scale, rtol=scale, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_align_and_rotate_are_the_references(ops: Ops, shape: Shape, scattered: bool, dtype: torch.dtype) -> None:
    source, target = places(150, scattered=scattered)  # more than a block, and not a multiple of one
    reference = make_ops("reference", DEVICE)
    offsets, near = table(shape), neighbors(shape, 150, 3)
    mine, theirs = stores(shape, dtype, source), stores(shape, dtype, source)
    ops.align(mine, source, target, offsets, near)
    reference.align(theirs, source, target, offsets, near)
    assert_same(mine, theirs, dtype)
    mine, theirs = stores(shape, dtype, source), stores(shape, dtype, source)
    ops.rotate(mine, source, target)
    reference.rotate(theirs, source, target)
    assert_same(mine, theirs, dtype)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 64])
def test_any_number_of_tokens_and_anchors(ops: Ops, num_tokens: int, k: int) -> None:
    shape = SHAPES["halves, other bases per layer"]
    source, target = places(num_tokens, scattered=True)
    mine, theirs = stores(shape, torch.float32, source), stores(shape, torch.float32, source)
    ops.align(mine, source, target, table(shape), neighbors(shape, num_tokens, k))
    make_ops("reference", DEVICE).align(theirs, source, target, table(shape), neighbors(shape, num_tokens, k))
    assert_same(mine, theirs, torch.float32)


def test_what_it_cannot_move_is_refused(ops: Ops) -> None:
    source, target = places(4, scattered=False)
    shape = SHAPES["no positions"]
    with pytest.raises(InvalidRequest, match=re.escape("torch.float64; choose 'reference'")):
        ops.rotate(stores(shape, torch.float64, source), source, target)
    spread = [LayerStore(each.keys[..., ::2], each.values, None) for each in stores(shape, torch.float32, source)]
    with pytest.raises(InvalidRequest, match="their stride is 2"):
        ops.rotate(spread, source, target)
