"""rotate and align: the reference against float64 and the model, the CPU path against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.contract import LayerStore, Neighbors, Ops, Place
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.model.rope import RopeGeometry
from tests.tiny import tiny_model

HALF = RopeGeometry("default", tuple(10_000 ** (-i / 4) for i in range(4)), interleaved=False)
PARTIAL = RopeGeometry("default", (1.0, 0.1), interleaved=False)
INTERLEAVED = RopeGeometry("default", tuple(500 ** (-i / 4) for i in range(4)), interleaved=True)
ROPES = (None, HALF, PARTIAL, INTERLEAVED)
NUM_SLOTS, NUM_HEADS, KEY_DIM, VALUE_DIM, NUM_ANCHORS = 96, 2, 8, 6, 9

PLACES = {
    "views": (Place(slice(5, 17), 40), Place(slice(50, 62), 7)),
    "scattered": (
        Place(torch.tensor([3, 2, 9, 30, 31, 8, 20, 21, 22, 40, 41, 11]), 2),
        Place(torch.tensor([60, 70, 61, 71, 62, 72, 63, 73, 64, 74, 65, 75]), 300),
    ),
    "view to scattered": (Place(slice(5, 8), 40), Place(torch.tensor([90, 80, 85]), 41)),
    "nothing": (Place(slice(5, 5), 40), Place(slice(50, 50), 41)),
}


def stores(dtype: torch.dtype) -> list[LayerStore]:
    generator = torch.Generator().manual_seed(1)
    return [
        LayerStore(
            torch.randn(NUM_SLOTS, NUM_HEADS, KEY_DIM, generator=generator).to(dtype),
            torch.randn(NUM_SLOTS, NUM_HEADS, VALUE_DIM, generator=generator).to(dtype),
            rope,
        )
        for rope in ROPES
    ]


def copies(layers: Sequence[LayerStore]) -> list[LayerStore]:
    return [LayerStore(layer.keys.clone(), layer.values.clone(), layer.rope) for layer in layers]


def anchors() -> OffsetTable:
    generator = torch.Generator().manual_seed(2)

    def rows(dim: int) -> OffsetRows:
        return OffsetRows.quantize(torch.randn(NUM_ANCHORS, NUM_HEADS, dim, generator=generator))

    keys = (None, *(rows(KEY_DIM) for _ in ROPES[1:]))
    return OffsetTable(keys, (None, *(rows(VALUE_DIM) for _ in ROPES[1:])))


def neighbors(num_tokens: int, k: int = 3) -> Neighbors:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, NUM_ANCHORS, (2, num_tokens, k), generator=generator)
    return Neighbors(indices, torch.rand(2, num_tokens, k, generator=generator), (0, 0, 1, 1))


def by_angle(keys: Tensor, positions: Sequence[int], rope: RopeGeometry | None) -> Tensor:
    """Keys [num_tokens, heads, dim] turned channel pair by channel pair as complex numbers, float64."""
    out = keys.double().clone()
    if rope is None:
        return out
    half = len(rope.inv_freq)
    for pair, frequency in enumerate(rope.inv_freq):
        first, second = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + half)
        turned = torch.complex(keys[..., first].double(), keys[..., second].double())
        turned = turned * torch.exp(1j * frequency * torch.tensor(list(positions), dtype=torch.float64))[:, None]
        out[..., first], out[..., second] = turned.real, turned.imag
    return out


@pytest.fixture(params=["cpu", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param, "cpu")


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_align_is_what_the_formula_says(
    ops: Ops, places: tuple[Place, Place], dtype: torch.dtype, tolerance: float
) -> None:
    (source, target), layers, table = places, stores(dtype), anchors()
    before, near = copies(layers), neighbors(source.num_tokens)
    ops.align(layers, source, target, table, near)
    count = source.num_tokens
    for layer_id, (layer, old) in enumerate(zip(layers, before, strict=True)):
        group = near.group_of_layer[layer_id]
        added = []
        for rows, dim in ((table.keys[layer_id], KEY_DIM), (table.values[layer_id], VALUE_DIM)):
            offsets = torch.zeros(count, NUM_HEADS * dim, dtype=torch.float64)
            for token in range(count if rows is not None else 0):
                assert rows is not None
                for index, weight in zip(near.indices[group, token], near.weights[group, token], strict=True):
                    offsets[token] += float(weight) * rows.codes[index].double() * float(rows.scales[index])
            added.append(offsets.view(count, NUM_HEADS, dim))
        moved = by_angle(old.keys[source.slots], [target.start - source.start] * count, layer.rope)
        expected = moved + by_angle(added[0], range(target.start, target.start + count), layer.rope)
        torch.testing.assert_close(layer.keys[target.slots].double(), expected, atol=tolerance, rtol=tolerance)
        values = old.values[source.slots].double() + added[1]
        torch.testing.assert_close(layer.values[target.slots].double(), values, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_rotate_is_align_without_offsets(ops: Ops, places: tuple[Place, Place]) -> None:
    (source, target), rotated, aligned = places, stores(torch.float32), stores(torch.float32)
    ops.rotate(rotated, source, target)
    near = neighbors(source.num_tokens)
    ops.align(aligned, source, target, anchors(), near._replace(weights=torch.zeros_like(near.weights)))
    for one, other in zip(rotated, aligned, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one.values, other.values, atol=1e-6, rtol=1e-6)


def test_other_slots_are_neither_read_nor_written(ops: Ops) -> None:
    source, target = PLACES["scattered"]
    layers = stores(torch.float32)
    assert isinstance(source.slots, Tensor)
    assert isinstance(target.slots, Tensor)
    outside = torch.tensor([slot for slot in range(NUM_SLOTS) if slot not in {*source.slots.tolist()}])
    for layer in layers:
        layer.keys[outside] = layer.values[outside] = torch.nan
    ops.align(layers, source, target, anchors(), neighbors(source.num_tokens))
    written = set(target.slots.tolist())
    for layer in layers:
        for stored in (layer.keys, layer.values):
            is_nan = stored.flatten(1).isnan().any(1)
            assert not is_nan[target.slots].any()
            assert all(bool(is_nan[slot]) for slot in outside.tolist() if slot not in written)


def test_rotated_keys_are_the_models_own_at_the_new_position() -> None:
    """In the first layer keys depend on token and position alone, so moving them must give just what is computed."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        text, prefix = [7, 8, 9, 10, 11], list(range(20, 53))
        alone, behind = engine.context(text), engine.context(prefix + text)
        layer = LayerStore(engine.pool.keys[0], engine.pool.values[0], engine.geometry.layers[0].rope)
        source = engine.pool.slots(alone.sequence.pages, len(text))
        truth = engine.pool.slots(behind.sequence.pages, len(prefix) + len(text))
        assert isinstance(source, slice)
        assert isinstance(truth, slice)
        pages = engine.pool.allocate(1)
        target = slice(int(pages[0]) * 16, int(pages[0]) * 16 + len(text))
        make_ops("cpu", "cpu").rotate([layer], Place(source, 0), Place(target, len(prefix)))
        expected = layer.keys[truth][len(prefix) :]
        torch.testing.assert_close(layer.keys[target], expected, atol=1e-5, rtol=1e-5)
        engine.pool.release(np.asarray(pages))


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'fast'"):
        make_ops("fast", "cpu")
    with pytest.raises(InvalidRequest, match="do not run on cuda"):
        make_ops("cpu", "cuda")
