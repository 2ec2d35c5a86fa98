"""What the self-test of the moving kernel computes: spans of a few layers, rotated only and corrected.

Layers have rotations of every kind, and none; slots are consecutive or scattered, and all that hold no source are NaN.
Keys are held against products of complex numbers in float64, another derivation than the kernel's and the reference's.
Runs in the process of `kvcomm.model.self_test`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops import reference
from kvcomm.align.ops.contract import LayerStore, Neighbors, Ops, Place
from kvcomm.align.ops.triton_launch import DTYPES, Mover
from kvcomm.model.rope import RopeGeometry
from kvcomm.model.self_test import KernelsDiffer, SelfTest, described, require_close

TRITON_MOVES = SelfTest("moving KV by 'triton'", __name__, "reference")
"""What has to pass on a device before Triton's kernels move KV there."""

NUM_SLOTS, NUM_HEADS, NUM_TOKENS, NUM_ANCHORS, NUM_NEIGHBORS = 256, 2, 70, 9, 8


def _rope(rotary_dim: int, base: float, *, interleaved: bool = False) -> RopeGeometry:
    inv_freq = tuple(base ** (-pair / rotary_dim) for pair in range(0, rotary_dim, 2))
    return RopeGeometry("default", inv_freq, interleaved=interleaved)


class KVShape(NamedTuple):
    """Key and value channels, and a rotation for each layer."""

    name: str
    key_dim: int
    value_dim: int
    ropes: tuple[RopeGeometry | None, ...]


SHAPES = (
    KVShape("halves", 64, 64, (_rope(64, 1e4), _rope(64, 1e4), _rope(64, 1e6))),
    KVShape("interleaved", 128, 128, (_rope(128, 1e4, interleaved=True),) * 2),
    KVShape("partial", 80, 48, (_rope(32, 1e4), _rope(32, 1e4), None, _rope(20, 500, interleaved=True))),
)


class MoveKind(NamedTuple):
    """The kind of a move: what is done, and whether slots are consecutive.

    To the kernel all slots are alike: two kinds do.
    """

    corrected: bool
    scattered: bool


KINDS = (MoveKind(corrected=False, scattered=False), MoveKind(corrected=True, scattered=True))


class MoveCase(NamedTuple):
    """What is moved from where to where; every layer but the first has offsets."""

    layers: tuple[LayerStore, ...]
    source: Place
    target: Place
    offsets: OffsetTable
    neighbors: Neighbors
    corrected: bool

    @classmethod
    def of(cls, shape: KVShape, dtype: torch.dtype, device: torch.device, kind: MoveKind) -> MoveCase:
        """Seeded. Sources lie within one, and so do offsets and the sum of each token's weights."""
        generator = torch.Generator().manual_seed(len(shape.name))

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(*sizes, generator=generator) * 2 - 1

        def stored(dim: int, slots: slice | Tensor) -> Tensor:
            values = torch.full((NUM_SLOTS, NUM_HEADS, dim), torch.nan)
            values[slots] = uniform(NUM_TOKENS, NUM_HEADS, dim)
            return values.to(dtype).to(device)

        def rows(dim: int) -> OffsetRows:
            made = OffsetRows.quantize(uniform(NUM_ANCHORS, NUM_HEADS, dim))
            return OffsetRows(made.codes.to(device), made.scales.to(device))

        slots = torch.randperm(NUM_SLOTS, generator=generator)
        places = slots[:NUM_TOKENS], slots[NUM_TOKENS : 2 * NUM_TOKENS]
        source: slice | Tensor = places[0] if kind.scattered else slice(3, 3 + NUM_TOKENS)
        target: slice | Tensor = places[1] if kind.scattered else slice(120, 120 + NUM_TOKENS)
        layers = tuple(
            LayerStore(stored(shape.key_dim, source), stored(shape.value_dim, source), rope) for rope in shape.ropes
        )
        count = len(layers) - 1
        weights = torch.rand(2, NUM_TOKENS, NUM_NEIGHBORS, generator=generator)
        return cls(
            layers,
            Place(_on(source, device), 700),
            Place(_on(target, device), 31),
            OffsetTable(
                (None, *(rows(shape.key_dim) for _ in range(count))),
                (None, *(rows(shape.value_dim) for _ in range(count))),
            ),
            Neighbors(
                torch.randint(0, NUM_ANCHORS, weights.shape, generator=generator).to(device),
                (weights / weights.sum(-1, keepdim=True)).to(device),
                tuple(layer_id % 2 for layer_id in range(len(layers))),
            ),
            kind.corrected,
        )

    def truth(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer at the target, [num_tokens, num_heads, dim] float64."""
        layer = self.layers[layer_id]
        keys, values = (each[self.source.slots].cpu().double() for each in (layer.keys, layer.values))
        more = [self._added(rows, layer_id) for rows in (self.offsets.keys[layer_id], self.offsets.values[layer_id])]
        key_offsets, value_offsets = (
            each.view_as(like) if self.corrected and each is not None else torch.zeros_like(like)
            for each, like in zip(more, (keys, values), strict=True)
        )
        if layer.rope is None:
            return keys + key_offsets, values + value_offsets
        places = torch.arange(self.target.start, self.target.start + NUM_TOKENS)
        moved = torch.full((NUM_TOKENS,), self.target.start - self.source.start)
        return _turned(keys, moved, layer.rope) + _turned(key_offsets, places, layer.rope), values + value_offsets

    def _added(self, rows: OffsetRows | None, layer_id: int) -> Tensor | None:
        if rows is None:
            return None
        group = self.neighbors.group_of_layer[layer_id]
        offsets = rows.codes.cpu().double() * rows.scales.cpu().double()[:, None]
        indices, weights = self.neighbors.indices[group].cpu(), self.neighbors.weights[group].cpu().double()
        return torch.einsum("tk,tkc->tc", weights, offsets[indices])


def examine(device: torch.device, ops: Ops | None = None) -> None:
    """Move all spans by the Triton kernel, or by other operations.

    Raises:
        KernelsDiffer: the first move that differs, or cannot be made, and how the plain operations do there.
    """
    if ops is None:
        mover = Mover()
        ops = Ops(mover.rotate, mover.align)
    for shape, kind, dtype in product(SHAPES, KINDS, DTYPES):
        try:
            _examine(MoveCase.of(shape, dtype, device, kind), ops)
        except Exception as error:  # a compiler's or a driver's too
            plain = _how_reference_does(MoveCase.of(shape, dtype, device, kind))
            raise KernelsDiffer(
                f"{_label(shape, kind, dtype)}: {described(error)}; 'reference' {plain} there"
            ) from error


def _how_reference_does(move: MoveCase) -> str:
    try:
        _examine(move, Ops(reference.rotate, reference.align))
    except Exception as error:
        return f"fails as well ({described(error)})"
    return "is right"


def _examine(move: MoveCase, ops: Ops) -> None:
    expected = [move.truth(layer_id) for layer_id in range(len(move.layers))]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in move.layers]
    if move.corrected:
        ops.align(move.layers, move.source, move.target, move.offsets, move.neighbors)
    else:
        ops.rotate(move.layers, move.source, move.target)
    for layer_id, (name, stored, old, truth) in _tensors(move.layers, before, expected):
        what = f"{name} of layer {layer_id}"
        require_close(what, stored[move.target.slots], truth, largest=2.0)
        old[move.target.slots] = stored[move.target.slots]
        if not torch.equal(stored.nan_to_num(7.0), old.nan_to_num(7.0)):
            raise KernelsDiffer(f"{what}: slots beside the target have changed")


def _tensors(
    layers: Sequence[LayerStore], before: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[int, tuple[str, Tensor, Tensor, Tensor]]]:
    """Name, storage, copy made before, and truth of all keys and values."""
    for layer_id, (layer, old, truth) in enumerate(zip(layers, before, expected, strict=True)):
        yield layer_id, ("keys", layer.keys, old[0], truth[0])
        yield layer_id, ("values", layer.values, old[1], truth[1])


def _turned(keys: Tensor, positions: Tensor, rope: RopeGeometry) -> Tensor:
    """Keys [num_tokens, num_heads, dim] float64 turned by each token's position; angles are float32, as promised."""
    angles = (positions.float()[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float32)).double()
    rotary, rest = keys[..., : rope.rotary_dim], keys[..., rope.rotary_dim :]
    pairs = rotary.unflatten(-1, (-1, 2) if rope.interleaved else (2, -1))
    along = -1 if rope.interleaved else -2
    turned = torch.complex(*pairs.unbind(along)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((torch.stack((turned.real, turned.imag), along).flatten(-2), rest), -1)


def _on(slots: slice | Tensor, device: torch.device) -> slice | Tensor:
    return slots if isinstance(slots, slice) else slots.to(device)


def _label(shape: KVShape, kind: MoveKind, dtype: torch.dtype) -> str:
    done = "corrected" if kind.corrected else "rotated"
    return f"{shape.name}, {done}, {str(dtype).removeprefix('torch.')}"
