"""What is compiled for the CPU, as operations on tensors.

`align` and `rotate` go straight from slots to slots where the pool is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.ops.staging import Staging
from kvcomm.model.compiled import threads
from kvcomm.model.rope import RopeGeometry

NUM_SPARE = 4
"""Rows beyond k that are measured at once: mostly no other one can be nearer than these."""


def rotate(layers: Sequence[LayerStore], source: Place, target: Place) -> None:
    """See `contract.Rotate`."""
    _move(layers, source, target, None, None)


def align(
    layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
) -> None:
    """See `contract.Align`."""
    _move(layers, source, target, offsets, neighbors)


def turned(keys: Tensor, positions: Tensor, rope: RopeGeometry) -> Tensor:
    """Keys [num_tokens, num_heads, dim] float32, each token turned by its own of `positions`; a new tensor."""
    from kvcomm.align.ops import fused

    keys = keys.contiguous()
    out = torch.empty_like(keys)
    with threads():
        rows = keys.flatten(1).numpy(), out.flatten(1).numpy()
        fused.turn_rows(*rows, _cos_and_sin(positions, rope), keys.shape[2], rope.interleaved)
    return out


def nearest(rough: Tensor, squares: Tensor, queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances float32 and numbers int64 of the nearest rows, [num_queries, count].

    Ascending by distance, equal ones by row.

    Args:
        rough: [num_queries, num_rows], at most the squared distances less `squares`: they choose whom to measure.
        squares: [num_queries] float32.
        queries, rows: [num_queries, dim] and [num_rows, dim] float32.
    """
    from kvcomm.align.ops import fused

    distances, found = torch.empty(len(queries), count), torch.empty(len(queries), count, dtype=torch.int64)
    if not count:
        return distances, found
    with threads():
        measured = queries.contiguous().numpy(), rows.numpy()
        fused.nearest(rough.numpy(), squares.numpy(), *measured, distances.numpy(), found.numpy(), NUM_SPARE)
    return distances, found


def longest_matches(tokens: np.ndarray, text: np.ndarray, num_free: int, longest: int) -> np.ndarray:
    """Length of the longest text ending with each token that stands in `text` too, [num_tokens] int32.

    Args:
        tokens, text: token ids, int32.
        num_free: token i may match anywhere before `num_free + i`.
        longest: length up to which is counted.
    """
    from kvcomm.align.ops import fused

    found = np.empty(len(tokens), dtype=np.int32)
    fused.longest_matches(tokens, text, num_free, longest, found)
    return found


class _Weighted(NamedTuple):
    """The neighbors of one group of layers: [num_tokens, k] int32 and float32, k filled up to whole batches."""

    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, indices: Tensor, weights: Tensor, batch: int) -> _Weighted:
        missing = -indices.shape[1] % batch
        padded = [torch.nn.functional.pad(part, (0, missing)) for part in (indices.int(), weights.float())]
        return cls(padded[0].contiguous().numpy(), padded[1].contiguous().numpy())

    @classmethod
    def none(cls, num_tokens: int) -> _Weighted:
        return cls(np.empty((num_tokens, 0), dtype=np.int32), np.empty((num_tokens, 0), dtype=np.float32))


def _move(
    layers: Sequence[LayerStore],
    source: Place,
    target: Place,
    offsets: OffsetTable | None,
    neighbors: Neighbors | None,
) -> None:
    from kvcomm.align.ops import fused

    if not source.num_tokens:
        return
    nothing = _Weighted.none(source.num_tokens)
    groups = [nothing]
    if neighbors is not None:
        pairs = zip(neighbors.indices, neighbors.weights, strict=True)
        groups = [_Weighted.of(indices, weights, fused.BATCH) for indices, weights in pairs]
    turns = _Turns(source, target)
    with threads():
        for layer_id, layer in enumerate(layers):
            group = groups[0 if neighbors is None else neighbors.group_of_layer[layer_id]]
            for stored, rope, table in (
                (layer.keys, layer.rope, None if offsets is None else offsets.keys[layer_id]),
                (layer.values, None, None if offsets is None else offsets.values[layer_id]),
            ):
                weighted = nothing if table is None else group
                codes, scales = _arrays(table, stored)
                with Staging(stored, source, target) as rows:
                    span = (rows.source, rows.from_rows, rows.out, rows.to_rows, codes, scales, *weighted)
                    if rope is None:
                        fused.add_offsets(*span)
                    else:
                        place = turns.place(rope, needed=table is not None)
                        fused.turn_and_add(*span, turns.move(rope), place, stored.shape[2], rope.interleaved)


def _arrays(rows: OffsetRows | None, stored: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a layer; none where nothing is added."""
    if rows is None:
        return np.empty((0, stored[0].numel()), dtype=np.int8), np.empty(0, dtype=np.float32)
    return rows.codes.numpy(), rows.scales.numpy()


class _Turns:
    """The rotations of one call, made once for all layers that share them: cos, then sin, float32."""

    def __init__(self, source: Place, target: Place) -> None:
        self._delta = torch.tensor([target.start - source.start])
        self._positions = torch.arange(target.start, target.start + target.num_tokens)
        self._made: dict[tuple[int, RopeGeometry], np.ndarray] = {}

    def move(self, rope: RopeGeometry) -> np.ndarray:
        """[2, rotary_dim / 2]: from the source's positions to the target's."""
        made: np.ndarray = self._turn(self._delta, rope)[0]
        return made

    def place(self, rope: RopeGeometry, *, needed: bool) -> np.ndarray:
        """[num_tokens, 2, rotary_dim / 2]: from position 0 to each token's own; of no token if not needed."""
        return self._turn(self._positions if needed else self._positions[:0], rope)

    def _turn(self, positions: Tensor, rope: RopeGeometry) -> np.ndarray:
        key = (id(positions) if len(positions) else 0, rope)
        if key not in self._made:
            self._made[key] = _cos_and_sin(positions, rope)
        return self._made[key]


def _cos_and_sin(positions: Tensor, rope: RopeGeometry) -> np.ndarray:
    """[num_positions, 2, rotary_dim / 2] float32."""
    angles = positions.float()[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float32)
    turns: np.ndarray = torch.stack((angles.cos(), angles.sin()), dim=1).numpy()
    return turns
