"""What the operations work on, and what every implementation of them fulfils.

They read a span of KV in the pool and write it, moved, to another place of the same pool; all layers in one call. They
know slots and positions, nothing of segments, edges or requests. The slots written must not be among those read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kvcomm.align.offsets import OffsetTable
from kvcomm.model.rope import RopeGeometry


class LayerStore(NamedTuple):
    """One layer of the pool.

    Attributes:
        keys: [num_slots, num_kv_heads, key_dim], rotated.
        values: [num_slots, num_kv_heads, value_dim].
        rope: how keys follow the position; None: not at all.
    """

    keys: Tensor
    values: Tensor
    rope: RopeGeometry | None


class Place(NamedTuple):
    """Where the tokens of a span are.

    Attributes:
        slots: a slice without a step, or [num_tokens] int64 on the pool's device.
        start: position of the first token in its context.
        owner: whose KV it is, if that does not change while the owner lives: what is derived from it may be kept as
            long. None: nobody says so.
    """

    slots: slice | Tensor
    start: int
    owner: object | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the span."""
        return self.slots.stop - self.slots.start if isinstance(self.slots, slice) else len(self.slots)


class Neighbors(NamedTuple):
    """Which anchors correct which token, and how much.

    Attributes:
        indices: [num_groups, num_tokens, k] int64, rows of the offset table.
        weights: [num_groups, num_tokens, k] float32, shrinkage included; they need not sum to one.
        group_of_layer: for every layer, the group whose neighbors it uses.
    """

    indices: Tensor
    weights: Tensor
    group_of_layer: tuple[int, ...]


class Rotate(Protocol):
    """Move a span: K' = R(target - source) K, V' = V."""

    def __call__(self, layers: Sequence[LayerStore], source: Place, target: Place) -> None:
        """Write to the target's slots. Angles are float32, each key is rounded once."""
        ...


class Align(Protocol):
    """Move a span and correct it: K' = R(target - source) K + R(target) dK, V' = V + dV, d* the weighted offsets.

    `R(target)` turns every token's offset to its own new position: start + index in the span.
    """

    def __call__(
        self, layers: Sequence[LayerStore], source: Place, target: Place, offsets: OffsetTable, neighbors: Neighbors
    ) -> None:
        """Write to the target's slots. Angles and sums are float32, each result is rounded once."""
        ...


class Ops(NamedTuple):
    """The operations of one implementation."""

    rotate: Rotate
    align: Align
