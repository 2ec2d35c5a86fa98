"""Launches the moving kernel: rows of a kind, over all layers that have it, in one launch.

Importing this module needs no triton; making a `Mover` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.ops.triton_shapes import NUM_THREADS, RowKind
from kvcomm.errors import InvalidRequest
from kvcomm.model.optional import needing
from kvcomm.model.rope import RopeGeometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayerRows(NamedTuple):
    """Keys or values of one layer, and what is added to them.

    Attributes:
        stored: [num_slots, num_heads, dim].
        rope: None: they are not rotated.
        offsets: None: nothing is added.
        group: of neighbors.
    """

    stored: Tensor
    rope: RopeGeometry | None
    offsets: OffsetRows | None
    group: int


class Mover:
    """Moves spans in Triton.

    Raises:
        InvalidRequest: the package triton is not installed.
    """

    def __init__(self) -> None:
        self._kernels = _load_kernels()

    def require(self, device: torch.device) -> None:
        """Raises InvalidRequest unless kernels run there: on a GPU, or in the interpreter on CPU tensors."""
        is_interpreted = bool(self._kernels.INTERPRETED)
        if (device.type == "cpu") != is_interpreted:
            why = "TRITON_INTERPRET=1 runs them on CPU tensors" if is_interpreted else "they need a CUDA or ROCm device"
            raise InvalidRequest(f"the operations called 'triton' do not run on {device}: {why}; choose 'auto'")

    def rotate(self, layers: Sequence[LayerStore], source: Place, target: Place) -> None:
        """See `contract.Rotate`."""
        self._move([*_rows(layers, None, None)], source, target, None)

    def align(
        self, layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
    ) -> None:
        """See `contract.Align`."""
        self._move([*_rows(layers, offsets, neighbors)], source, target, neighbors)

    def _move(self, rows: Sequence[LayerRows], source: Place, target: Place, neighbors: Neighbors | None) -> None:
        if not source.num_tokens:
            return
        k = 0 if neighbors is None else neighbors.indices.shape[2]
        alike: dict[tuple[RowKind, torch.dtype, tuple[int, ...]], list[LayerRows]] = {}
        for each in rows:
            kind = RowKind.of(each.stored.shape[2], each.rope, 0 if each.offsets is None else k)
            alike.setdefault((kind, each.stored.dtype, (each.stored.shape[1], *each.stored.stride())), []).append(each)
        spans = _Spans.of(rows[0].stored.device, source, target, neighbors)
        for (kind, _, _), group in alike.items():
            self._launch(kind, group, spans)

    def _launch(self, kind: RowKind, rows: Sequence[LayerRows], spans: _Spans) -> None:
        stored = rows[0].stored
        _check(stored)
        ropes = list(dict.fromkeys(each.rope for each in rows if each.rope is not None))
        offsets = [each.offsets for each in rows if each.offsets is not None]
        grid = (-(-spans.num_tokens // kind.block_tokens), stored.shape[1], len(rows))
        with torch.cuda.device_of(stored):
            self._kernels.move_rows[grid](
                _addresses([each.stored for each in rows], stored.device),
                _addresses([each.codes for each in offsets], stored.device),
                _addresses([each.scales for each in offsets], stored.device),
                torch.tensor([each.group for each in rows], dtype=torch.int32, device=stored.device),
                torch.tensor(
                    [0 if each.rope is None else ropes.index(each.rope) for each in rows],
                    dtype=torch.int32,
                    device=stored.device,
                ),
                spans.sources,
                spans.targets,
                spans.indices,
                spans.weights,
                _turns(ropes, spans.delta),
                _turns(ropes, spans.positions),
                spans.num_tokens,
                stored.stride(0),
                stored.stride(1),
                offsets[0].codes.stride(0) if offsets else 0,
                ELEMENT=self._kernels.ELEMENTS[stored.dtype],
                **kind.constants(),
                num_warps=NUM_THREADS // (64 if torch.version.hip else 32),
            )


@dataclass(frozen=True)
class _Spans:
    """What all launches of one call share, on the device.

    Attributes:
        sources, targets: [num_tokens] int64 slots.
        delta: [1], positions that the span is moved by; `positions`: [num_tokens], where it is moved to.
        indices: [num_groups, num_tokens, k] int32; `weights`: the same shape, float32.
    """

    sources: Tensor
    targets: Tensor
    delta: Tensor
    positions: Tensor
    indices: Tensor
    weights: Tensor

    @classmethod
    def of(cls, device: torch.device, source: Place, target: Place, neighbors: Neighbors | None) -> _Spans:
        empty = torch.empty(0, device=device)
        return cls(
            _slots(source, device),
            _slots(target, device),
            torch.tensor([target.start - source.start], device=device),
            torch.arange(target.start, target.start + target.num_tokens, device=device),
            empty.int() if neighbors is None else neighbors.indices.int().contiguous(),
            empty if neighbors is None else neighbors.weights.float().contiguous(),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.sources)


def _rows(layers: Sequence[LayerStore], offsets: OffsetTable | None, neighbors: Neighbors | None) -> list[LayerRows]:
    """Keys and values of all layers."""
    found = []
    for layer_id, layer in enumerate(layers):
        group = 0 if neighbors is None else neighbors.group_of_layer[layer_id]
        found.append(LayerRows(layer.keys, layer.rope, None if offsets is None else offsets.keys[layer_id], group))
        found.append(LayerRows(layer.values, None, None if offsets is None else offsets.values[layer_id], group))
    return found


def _slots(place: Place, device: torch.device) -> Tensor:
    if isinstance(place.slots, slice):
        return torch.arange(place.slots.start, place.slots.stop, device=device)
    return place.slots.to(device)


def _addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64, device=device)


def _turns(ropes: Sequence[RopeGeometry], positions: Tensor) -> Tensor:
    """[num_ropes, num_positions, 2, rotary_dim / 2] float32: cos, then sin, of every rotation at every position."""
    if not ropes:
        return torch.empty(0, device=positions.device)
    inv_freq = torch.tensor([rope.inv_freq for rope in ropes], dtype=torch.float32, device=positions.device)
    angles = positions.float()[None, :, None] * inv_freq[:, None]
    return torch.stack((angles.cos(), angles.sin()), dim=2).contiguous()


def _load_kernels() -> ModuleType:
    refusal = "the operations called 'triton' need the package triton: install kvcomm[triton] or choose 'auto'"
    with needing("triton", refusal):
        from kvcomm.align.ops import triton_kernels
    return triton_kernels


def _check(stored: Tensor) -> None:
    if stored.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise InvalidRequest(f"the operations called 'triton' move {names}, not {stored.dtype}; choose 'reference'")
    if stored.stride(2) != 1:
        raise InvalidRequest(f"channels of keys and values must be contiguous, their stride is {stored.stride(2)}")
