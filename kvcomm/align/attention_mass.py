"""How much attention some rows of a prompt pay to what stands before them, head by head.

Seen while a pass computes those rows: queries are handed over behind every layer, keys are in the pool. The layers that
are looked at are those in which copying heads live and what feeds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.align.ops.contract import LayerStore
from kvcomm.model.runner import ScoreWatch


def looking_layers(num_layers: int) -> range:
    """Layers in which the end of a prompt tells what its answer will read: from a third to five sixths."""
    first = num_layers // 3
    return range(first, max(5 * num_layers // 6, first + 1))


def damaged_layers(num_layers: int) -> range:
    """Layers whose keys carry most of the damage of moved KV: the third quarter."""
    first = num_layers // 2
    return range(first, max(3 * num_layers // 4, first + 1))


MAX_LOOKING_ROWS = 64
"""Of a prompt's tail; a longer one says what it asks for at its end."""


def looking_rows(moves_end: int, num_tokens: int) -> tuple[int, int]:
    """`[first, end)` of a prompt's tail that tell what its answer will read: what stands behind all moved text."""
    return max(moves_end, num_tokens - MAX_LOOKING_ROWS), num_tokens


class AttentionMass:
    """Sums up what rows `[first, end)` of one sequence attend to, in some layers.

    The rows may be computed in several passes, together with anything else; a pass that is repeated counts once.
    """

    def __init__(self, layers: Sequence[LayerStore], layer_ids: range, first: int, end: int) -> None:
        self._layers = layers
        self._layer_ids = layer_ids
        self._rows = first, end
        self._paid: dict[int, dict[tuple[int, int], Tensor]] = {}  # by layer and rows: [num_heads, end of the rows]

    def by_head(self, positions: Tensor) -> Tensor:
        """[num_layers * num_heads, num_positions] float32: to each position, summed over rows.

        Args:
            positions: [num_positions] int64, before the end of the rows.
        """
        return torch.cat([self._mass(layer_id)[:, positions] for layer_id in self._layer_ids])

    def watch(self, slots: slice | Tensor, row: int, start: int, end: int) -> ScoreWatch | None:
        """For a pass whose rows from `row` on are positions `[start, end)`: what to call behind every layer.

        None when none of the rows that are looked at is among them.

        Args:
            slots: of the positions from 0 on, at least `end` of them, during this pass.
        """
        first, last = max(start, self._rows[0]), min(end, self._rows[1])
        if first >= last:
            return None
        rows, positions = slice(row + first - start, row + last - start), (first, last)
        return lambda layer_id, query, scale: self._add(layer_id, query[0, :, rows], slots, positions, scale)

    def _add(
        self, layer_id: int, query: Tensor, slots: slice | Tensor, positions: tuple[int, int], scale: float
    ) -> None:
        """Add one layer: queries [num_heads, num_rows, key_dim] of these positions; the keys are in the pool."""
        if layer_id not in self._layer_ids:
            return
        first, last = positions
        keys = self._layers[layer_id].keys[slots][:last].float().permute(1, 2, 0)  # [num_kv_heads, key_dim, last]
        scores = query.float().reshape(len(keys), -1, query.shape[2]) @ keys
        scores = scores.view(len(query), -1, last) * scale
        seen = torch.arange(first, last, device=keys.device)[:, None]
        is_hidden = torch.arange(last, device=keys.device)[None] > seen
        paid = scores.masked_fill_(is_hidden, -torch.inf).softmax(-1).sum(1)
        self._paid.setdefault(layer_id, {})[positions] = paid

    def _mass(self, layer_id: int) -> Tensor:
        """[num_heads, end of all rows]: what all rows of one layer paid."""
        parts = list(self._paid[layer_id].values())
        mass = parts[0].new_zeros(len(parts[0]), self._rows[1])
        for paid in parts:
            mass[:, : paid.shape[1]] += paid
        return mass
