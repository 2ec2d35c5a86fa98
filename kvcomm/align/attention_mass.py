"""How much attention the end of a prompt pays to what stands before it: the score by which rungs choose tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.align.ops.contract import LayerStore
from kvcomm.model.runner import Watch

MAX_TAIL = 64
"""Tokens of the tail that are looked at, the last ones; a longer one would make looking dear."""


class AttentionMass:
    """Sums up what the tail of one sequence attends to, over the heads of the third quarter of the layers.

    Copying heads live there. The tail may be computed in several passes, together with anything else.

    Attributes:
        mass: [num_tokens] float32 on the pool's device; attention to each position, summed over heads and rows.
    """

    def __init__(self, layers: Sequence[LayerStore], tail_start: int, tail_end: int) -> None:
        """Args:
        tail_start, tail_end: positions that the tail covers; of a long one the end counts.
        """
        self._layers = layers
        self._tail = max(tail_start, tail_end - MAX_TAIL), tail_end
        self._first_layer = len(layers) // 2
        self._last_layer = max(3 * len(layers) // 4, self._first_layer + 1) - 1
        self.mass = torch.zeros(tail_end, device=layers[0].keys.device)

    def watch(self, slots: slice | Tensor, row: int, start: int, end: int) -> Watch | None:
        """For a pass whose rows from `row` on are positions `[start, end)`: what to call behind every layer.

        None when no row of it belongs to the tail.

        Args:
            slots: of the positions from 0 on, at least `end` of them, during this pass.
        """
        first, last = max(start, self._tail[0]), min(end, self._tail[1])
        if first >= last:
            return None
        rows, positions = slice(row + first - start, row + last - start), (first, last)
        return lambda layer_id, query, scale: self._add(layer_id, query[0, :, rows], slots, positions, scale)

    def _add(
        self, layer_id: int, query: Tensor, slots: slice | Tensor, positions: tuple[int, int], scale: float
    ) -> None:
        """Add one layer: queries [num_heads, num_rows, key_dim] of these positions; the keys are in the pool."""
        if not self._first_layer <= layer_id <= self._last_layer:
            return
        first, last = positions
        keys = self._layers[layer_id].keys[slots][:last].float().transpose(0, 1)
        keys = keys.repeat_interleave(len(query) // len(keys), dim=0)
        scores = query.float() @ keys.transpose(1, 2) * scale
        seen = torch.arange(first, last, device=keys.device)[:, None]
        is_hidden = torch.arange(last, device=keys.device)[None] > seen
        self.mass[:last] += scores.masked_fill(is_hidden, -torch.inf).softmax(-1).sum((0, 1))
