"""`align` for the CPU: offsets are gathered, dequantized and summed by one operator per layer and kind.

The operator is torch's rowwise 8-bit embedding bag (FBGEMM), made for just this access pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetTable
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.ops.spin import add_turned, cos_and_sin, put_turned
from kvcomm.align.ops.staging import Staging

SUM = 0
"""The operator's mode."""


def align(
    layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
) -> None:
    """See `contract.Align`."""
    if not target.num_tokens:
        return
    ropes = {layer.rope for layer in layers if layer.rope is not None}
    delta = torch.tensor([target.start - source.start])
    positions = torch.arange(target.start, target.start + target.num_tokens)
    moves = {rope: cos_and_sin(rope, delta) for rope in ropes}
    turns = {rope: cos_and_sin(rope, positions) for rope in ropes}
    bags = [_Bag(indices, weights) for indices, weights in zip(neighbors.indices, neighbors.weights, strict=True)]
    packed_keys, packed_values = offsets.packed
    for layer_id, layer in enumerate(layers):
        bag = bags[neighbors.group_of_layer[layer_id]]
        with Staging(layer.keys, source, target) as keys:
            if layer.rope is None:
                keys.out.copy_(keys.source)
            else:
                fixed = slice(layer.rope.rotary_dim, None)
                keys.out[..., fixed] = keys.source[..., fixed]
                put_turned(keys.out, keys.source, layer.rope, *moves[layer.rope])
            rows = packed_keys[layer_id]
            if rows is not None:
                added = bag.sum(rows).view_as(keys.out)
                if layer.rope is None:
                    keys.out.add_(added)
                else:
                    keys.out[..., fixed] += added[..., fixed]
                    add_turned(keys.out, added, layer.rope, *turns[layer.rope])
        with Staging(layer.values, source, target) as values:
            rows = packed_values[layer_id]
            if rows is None:
                values.out.copy_(values.source)
            else:
                torch.add(values.source, bag.sum(rows).view_as(values.out), out=values.out)


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
