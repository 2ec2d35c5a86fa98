"""KV events as bytes: what vLLM's publisher sends, so that whatever reads vLLM's reads these.

A batch is the MessagePack array [seconds since 1970, events, data-parallel rank]. In the form `map` an event is a map
with its "type" and named fields, as vLLM writes it since the summer of 2026; in the form `array` it is an array that
begins with the type, as it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from kvcomm.server.kv_events.announcer import AllCleared, BlocksRemoved, BlocksStored, KVEvent

Form = Literal["map", "array"]

RANK = 0
"""Of this process among data-parallel ones: it is the only one."""
GROUP = 0
"""Of the layers that a block's KV is of: there is one group, with all of them."""


class _Named(NamedTuple):
    """An event: its type, and its fields in vLLM's order."""

    kind: str
    fields: dict[str, Any]

    def as_map(self) -> dict[str, Any]:
        return {"type": self.kind, **self.fields}

    def as_array(self) -> list[Any]:
        return [self.kind, *self.fields.values()]


class Encoder:
    """Makes batches."""

    def __init__(self, form: Form, *, block_size: int, medium: str) -> None:
        """Make one.

        Args:
            medium: where the KV lies: GPU or CPU.
        """
        import msgspec

        self._encode = msgspec.msgpack.Encoder().encode
        self._form = form
        self._block_size = block_size
        self._medium = medium

    def batch(self, events: Sequence[KVEvent], at_s: float) -> bytes:
        """A batch of events.

        Args:
            at_s: when they happened, in seconds since 1970.
        """
        named = [self._named(event) for event in events]
        written = [each.as_map() if self._form == "map" else each.as_array() for each in named]
        return self._encode([at_s, written, RANK])

    def _named(self, event: KVEvent) -> _Named:
        if isinstance(event, AllCleared):
            return _Named("AllBlocksCleared", {})
        if isinstance(event, BlocksRemoved):
            fields = {"block_hashes": event.block_hashes, "medium": self._medium, "group_idx": GROUP}
            return _Named("BlockRemoved", fields)
        fields = {
            "block_hashes": event.block_hashes,
            "parent_block_hash": event.parent_block_hash,
            "token_ids": event.token_ids,
            "block_size": self._block_size,
            "lora_id": None,
            "medium": self._medium,
            "lora_name": event.owner.adapter or None,
            "extra_keys": _extra_keys(event),
            "group_idx": GROUP,
        }
        return _Named("BlockStored", fields)


def _extra_keys(event: BlocksStored) -> list[list[str] | None]:
    """Values of each block's extra keys, without their kinds."""
    indices = range(event.first_index, event.first_index + len(event.block_hashes))
    return [[key[1] for key in event.owner.keys(index)] or None for index in indices]
