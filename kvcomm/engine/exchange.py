"""KV in and out of the pool as plain tensors, for snapshots and adapters. Both directions copy."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AnySequence

from torch import Tensor

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.pool import LayerShape, PagePool
from kvcomm.memory.sequences import Sequence
from kvcomm.model.geometry import ModelGeometry


def layer_shapes(geometry: ModelGeometry) -> list[LayerShape]:
    """What each layer of a model stores per token."""
    return [LayerShape(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers]


class KVExchange:
    """Reads and writes whole sequences; to be called under the engine's lock."""

    def __init__(
        self,
        pool: PagePool,
        shapes: AnySequence[LayerShape],
        make_writable: Callable[[Sequence, int, int], None],
    ) -> None:
        """`make_writable` gets a sequence the pages of a range of positions, evicting if it must."""
        self.shapes = tuple(shapes)
        self._pool = pool
        self._make_writable = make_writable

    def read(self, sequence: Sequence) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the computed tokens, per layer [num_computed, num_kv_heads, dim]."""
        slots = self._pool.slots(sequence.pages, sequence.num_computed)
        return [layer[slots].clone() for layer in self._pool.keys], [
            layer[slots].clone() for layer in self._pool.values
        ]

    def write(
        self,
        token_ids: AnySequence[int],
        keys: AnySequence[Tensor],
        values: AnySequence[Tensor],
        fidelity: Fidelity,
    ) -> Sequence:
        """A new sequence whose first tokens have this KV, per layer [num_computed, num_kv_heads, dim].

        Raises:
            PoolExhausted: no pages for it; nothing is kept.
        """
        sequence = Sequence(self._pool, token_ids)
        sequence.fidelity = fidelity
        num_computed = len(keys[0])
        self._make_writable(sequence, 0, num_computed)
        slots = self._pool.slots(sequence.pages, num_computed)
        for stored, new in zip((*self._pool.keys, *self._pool.values), (*keys, *values), strict=True):
            stored[slots] = new.to(stored.device)
        sequence.num_computed = num_computed
        return sequence
