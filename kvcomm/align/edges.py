"""Edges: from which context to which other one the KV of a segment is moved."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvcomm.align.slot_kinds import kind_of
from kvcomm.memory.segments import Segment

_SIGNATURE_DOMAIN = b"kvcomm signature 2\0"
_EDGE_DOMAIN = b"kvcomm edge 1\0"
_TAGGED_TOKEN = np.dtype([("tag", "S1"), ("id", "<i4")])


def signatures(segments: Sequence[Segment]) -> tuple[str, ...]:
    """The signature of every segment of a prompt, hex SHA-256 over the template up to its end.

    Of segments without a name (template text) token ids count, of those with one (slots) only the kind (`kind_of`):
    dynamic text never enters. Cutting static text differently changes nothing behind it. Slots of one kind in a row
    have the signature of the first one, and what stands between them does not count behind the row either: a passage
    is the same passage in any of them.
    """
    running = hashlib.sha256(_SIGNATURE_DOMAIN)
    found = []
    row: str | None = None
    behind_row = running
    for segment in segments:
        if segment.name is None:
            tagged = np.empty(len(segment.token_ids), dtype=_TAGGED_TOKEN)
            tagged["tag"], tagged["id"] = b"t", segment.token_ids
            running.update(tagged.tobytes())
        elif kind_of(segment.name) == row:
            running = behind_row.copy()
        else:
            row = kind_of(segment.name)
            running.update(b"s" + _sized(row))
            behind_row = running.copy()
        found.append(running.hexdigest())
    return tuple(found)


@dataclass(frozen=True)
class Edge:
    """From a source signature to a target signature. Kinds of slots are for people and for the general fallback."""

    source: str
    target: str
    slot: str
    source_slot: str

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the length-prefixed fields."""
        fields = (self.source, self.target, self.slot, self.source_slot)
        return hashlib.sha256(_EDGE_DOMAIN + b"".join(map(_sized, fields))).hexdigest()

    @property
    def general(self) -> Edge:
        """The same slots in any context: what is used while the specific edge is young."""
        return replace(self, source="", target="")

    @property
    def is_general(self) -> bool:
        """Whether it stands for any context."""
        return not self.source and not self.target


def _sized(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
