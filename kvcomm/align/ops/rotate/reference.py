"""`rotate` as plainly as possible."""

from __future__ import annotations

from collections.abc import Sequence

from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.model.rope import rotate as turned


def rotate(layers: Sequence[LayerStore], source: Place, target: Place) -> None:
    """See `contract.Rotate`."""
    for layer in layers:
        keys = layer.keys[source.slots].clone()
        if layer.rope is not None:
            keys = turned(keys, target.start - source.start, layer.rope)
        layer.keys[target.slots] = keys
        layer.values[target.slots] = layer.values[source.slots].clone()
