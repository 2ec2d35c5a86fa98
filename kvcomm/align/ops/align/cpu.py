"""`align` for the CPU: offsets are gathered, dequantized and summed by one operator per layer and kind.

The operator is torch's rowwise 8-bit embedding bag (FBGEMM), made for just this access pattern. It reads every key
offset together with its quarter turn, so that turning the sums to their positions takes two passes over whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.ops.spin import Turn, put_turned, quarter_turned
from kvcomm.align.ops.staging import Staging
from kvcomm.model.rope import RopeGeometry

SUM = 0
"""The operator's mode."""


def align(
    layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
) -> None:
    """See `contract.Align`."""
    if not target.num_tokens:
        return
    bags = [_Bag(indices, weights) for indices, weights in zip(neighbors.indices, neighbors.weights, strict=True)]
    turns = _Turns(source, target)
    packed_keys, packed_values = _packed(offsets, layers)
    for layer_id, layer in enumerate(layers):
        bag = bags[neighbors.group_of_layer[layer_id]]
        with Staging(layer.keys, source, target) as keys:
            _put_keys(keys, layer.rope, turns, bag, packed_keys[layer_id])
        with Staging(layer.values, source, target) as values:
            rows = packed_values[layer_id]
            if rows is None:
                values.out.copy_(values.source)
            else:
                torch.add(values.source, bag.sum(rows).view_as(values.out), out=values.out)


def _put_keys(keys: Staging, rope: RopeGeometry | None, turns: _Turns, bag: _Bag, rows: Tensor | None) -> None:
    out = keys.out.flatten(1)
    if rope is None:
        keys.out.copy_(keys.source)
    else:
        put_turned(keys.out, keys.source, rope, turns.move(rope, keys.out))
    if rows is None:
        return
    if rope is None:
        out.add_(bag.sum(rows))
        return
    turn = turns.place(rope, keys.out)
    added, quarter = bag.sum(rows).chunk(2, dim=1)
    out.addcmul_(added, turn.cos).addcmul_(quarter, turn.sin)


class _Turns:
    """The rotations of one call, made once for all layers that share them."""

    def __init__(self, source: Place, target: Place) -> None:
        self._delta = torch.tensor([target.start - source.start])
        self._positions = torch.arange(target.start, target.start + target.num_tokens)
        self._made: dict[tuple[bool, RopeGeometry, torch.Size], Turn] = {}

    def move(self, rope: RopeGeometry, keys: Tensor) -> Turn:
        """From the source's positions to the target's: one row."""
        return self._turn(self._delta, rope, keys, is_move=True)

    def place(self, rope: RopeGeometry, keys: Tensor) -> Turn:
        """From position 0 to each token's own: a row per token."""
        return self._turn(self._positions, rope, keys, is_move=False)

    def _turn(self, positions: Tensor, rope: RopeGeometry, keys: Tensor, *, is_move: bool) -> Turn:
        key = (is_move, rope, keys.shape)
        if key not in self._made:
            self._made[key] = Turn.to(positions, rope, num_heads=keys.shape[1], dim=keys.shape[2])
        return self._made[key]


class _Bag:
    """The neighbors of one group of layers, as the operator wants them."""

    def __init__(self, indices: Tensor, weights: Tensor) -> None:
        num_tokens, k = indices.shape
        self._indices = indices.reshape(-1).int()
        self._weights = weights.reshape(-1).float()
        self._starts = torch.arange(0, num_tokens * k, k, dtype=torch.int32)

    def sum(self, packed: Tensor) -> Tensor:
        """Weighted sums of packed rows, [num_tokens, channels] float32."""
        summed = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            packed, self._indices, self._starts, False, SUM, False, self._weights, None, False
        )
        assert isinstance(summed, Tensor)
        return summed


Packed = tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]


def _packed(offsets: OffsetTable, layers: Sequence[LayerStore]) -> Packed:
    """Rows of keys with their quarter turns behind them, and rows of values; made once per table."""
    if offsets.packed is None:
        keys = tuple(
            None if rows is None else _with_quarter_turn(rows, layer)
            for rows, layer in zip(offsets.keys, layers, strict=True)
        )
        values = tuple(None if rows is None else rows.packed() for rows in offsets.values)
        offsets.packed = keys, values
    return offsets.packed


def _with_quarter_turn(rows: OffsetRows, layer: LayerStore) -> Tensor:
    if layer.rope is None:
        return rows.packed()
    heads = rows.codes.unflatten(1, layer.keys.shape[1:])
    turned = quarter_turned(heads, layer.rope).flatten(1)
    return OffsetRows(torch.cat((rows.codes, turned), dim=1), rows.scales).packed()
