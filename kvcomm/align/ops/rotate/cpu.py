"""`rotate` for the CPU: one pass over each layer's keys, written straight to the target where it is contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.ops.spin import cos_and_sin, put_turned
from kvcomm.align.ops.staging import Staging
from kvcomm.model.rope import RopeGeometry


def rotate(layers: Sequence[LayerStore], source: Place, target: Place) -> None:
    """See `contract.Rotate`."""
    delta = torch.tensor([target.start - source.start])
    tables = {rope: cos_and_sin(rope, delta) for rope in {layer.rope for layer in layers} if rope is not None}
    for layer in layers:
        with Staging(layer.keys, source, target) as keys:
            keys.out[..., _rotary_dim(layer.rope) :] = keys.source[..., _rotary_dim(layer.rope) :]
            if layer.rope is not None:
                put_turned(keys.out, keys.source, layer.rope, *tables[layer.rope])
        with Staging(layer.values, source, target) as values:
            values.out.copy_(values.source)


def _rotary_dim(rope: RopeGeometry | None) -> int:
    return 0 if rope is None else rope.rotary_dim
