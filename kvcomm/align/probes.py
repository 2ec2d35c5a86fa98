"""Probes: recomputed tokens tell how far their estimates were off, before the first token of an answer is out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.attention_mass import damaged_layers
from kvcomm.align.ops.contract import LayerStore
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.model.attention.contract import IntArray

MAX_PROBES = 16


class Probes:
    """Estimated keys of a few tokens, to be held against what recomputing them gives.

    Only the third quarter of the layers is looked at: keys there carry the damage of moved KV.
    """

    def __init__(self, pool: PagePool, layers: Sequence[LayerStore], pages: PageIds, positions: IntArray) -> None:
        """Copies the estimates at (some of) `positions`, at least one, out of the pages of a sequence."""
        self._layers = [layers[layer_id] for layer_id in damaged_layers(len(layers))]
        few = positions[np.linspace(0, len(positions) - 1, min(MAX_PROBES, len(positions))).astype(np.int64)]
        slots = pages[few // pool.page_size].astype(np.int64) * pool.page_size + few % pool.page_size
        self._slots = torch.from_numpy(slots).to(pool.keys[0].device)
        self._estimates = self._keys()

    def residual(self) -> float:
        """Norm of the error of the estimates against the keys now in their slots, relative to those keys."""
        now = self._keys()
        return float((now - self._estimates).norm() / now.norm().clamp_min(torch.finfo(torch.float32).tiny))

    def _keys(self) -> Tensor:
        return torch.stack([layer.keys[self._slots].float().flatten(1) for layer in self._layers])
