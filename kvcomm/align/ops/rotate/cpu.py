"""`rotate` for the CPU: written straight to the target where that is contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.ops.spin import Turn, put_turned
from kvcomm.align.ops.staging import Staging


def rotate(layers: Sequence[LayerStore], source: Place, target: Place) -> None:
    """See `contract.Rotate`."""
    delta = torch.tensor([target.start - source.start])
    for layer in layers:
        with Staging(layer.keys, source, target) as keys:
            if layer.rope is None:
                keys.out.copy_(keys.source)
            else:
                turn = Turn.to(delta, layer.rope, num_heads=keys.out.shape[1], dim=keys.out.shape[2])
                put_turned(keys.out, keys.source, layer.rope, turn)
        with Staging(layer.values, source, target) as values:
            values.out.copy_(values.source)
