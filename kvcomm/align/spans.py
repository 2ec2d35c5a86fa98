"""KV of a span of tokens, read out of the pool and made independent of where the span stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops import cpu
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.rope import rotate


class SpanKV(NamedTuple):
    """Keys un-rotated (as at position 0) and values of a span, float32.

    Attributes:
        keys, values: per layer [num_tokens, num_kv_heads, dim].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the span."""
        return len(self.keys[0])

    def minus(self, other: SpanKV, layer_ids: Sequence[int]) -> OffsetTable:
        """Offsets that lead from `other` to this one in the layers given; the other layers have none."""
        wanted = frozenset(layer_ids)
        pairs = [zip(self.keys, other.keys, strict=True), zip(self.values, other.values, strict=True)]
        keys, values = (
            tuple(OffsetRows.quantize(true - known) if i in wanted else None for i, (true, known) in enumerate(pair))
            for pair in pairs
        )
        return OffsetTable(keys, values)


def layer_stores(pool: PagePool, geometry: ModelGeometry) -> tuple[LayerStore, ...]:
    """The pool's layers and how their keys are rotated."""
    return tuple(
        LayerStore(keys, values, layer.rope)
        for keys, values, layer in zip(pool.keys, pool.values, geometry.layers, strict=True)
    )


def place_of(
    pool: PagePool, pages: PageIds, first: int, num_tokens: int, *, position: int, owner: object | None = None
) -> Place:
    """Where tokens `first` to `first + num_tokens` of a page table lie; the first one stands at `position`."""
    slots = pool.slots(pages, first + num_tokens)
    if isinstance(slots, slice):
        return Place(slice(slots.start + first, slots.stop), position, owner)
    return Place(slots[first:], position, owner)


def read_span(layers: Sequence[LayerStore], place: Place, layer_ids: Sequence[int] | None = None) -> SpanKV:
    """Copy a span out of the pool, of all layers or of those given, and un-rotate its keys."""
    positions = torch.arange(place.start, place.start + place.num_tokens, device=layers[0].keys.device)
    chosen = layers if layer_ids is None else [layers[layer_id] for layer_id in layer_ids]
    keys = tuple(unrotated(layer, layer.keys[place.slots], positions) for layer in chosen)
    return SpanKV(keys, tuple(layer.values[place.slots].float().clone() for layer in chosen))


def unrotated(layer: LayerStore, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys [num_tokens, num_kv_heads, dim] at `positions` as they would be at position 0, float32, a copy."""
    if layer.rope is None:
        return keys.float().clone()
    if keys.device.type == "cpu":
        return cpu.turned(keys.float(), -positions, layer.rope)
    return rotate(keys.float(), -positions, layer.rope)
