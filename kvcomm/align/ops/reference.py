"""`rotate` and `align` as plainly as possible, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.model.rope import rotate as turned


def rotate(layers: Sequence[LayerStore], source: Place, target: Place) -> None:
    """See `contract.Rotate`."""
    for layer in layers:
        keys = layer.keys[source.slots].clone()
        if layer.rope is not None:
            keys = turned(keys, target.start - source.start, layer.rope)
        layer.keys[target.slots] = keys
        layer.values[target.slots] = layer.values[source.slots].clone()


def align(
    layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
) -> None:
    """See `contract.Align`."""
    positions = torch.arange(target.start, target.start + target.num_tokens, device=layers[0].keys.device)
    for layer_id, layer in enumerate(layers):
        group = neighbors.group_of_layer[layer_id]
        indices, weights = neighbors.indices[group], neighbors.weights[group]
        keys, values = layer.keys[source.slots].float(), layer.values[source.slots].float()
        key_offsets = _weighted(offsets.keys[layer_id], indices, weights, keys)
        value_offsets = _weighted(offsets.values[layer_id], indices, weights, values)
        if layer.rope is not None:
            keys = turned(keys, target.start - source.start, layer.rope)
            key_offsets = turned(key_offsets, positions, layer.rope)
        layer.keys[target.slots] = (keys + key_offsets).to(layer.keys.dtype)
        layer.values[target.slots] = (values + value_offsets).to(layer.values.dtype)


def _weighted(rows: OffsetRows | None, indices: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Weighted offsets shaped like the span's keys or values, float32."""
    if rows is None:
        return torch.zeros_like(like)
    return (rows.dequantize()[indices] * weights[..., None]).sum(1).view_as(like)
