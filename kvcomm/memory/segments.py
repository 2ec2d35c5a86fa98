"""Segments: units of text with an identity."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvcomm.plain import Plain

MAX_SHOWN = 8
_DOMAIN = b"kvcomm segment 1\0"


@dataclass(frozen=True)
class Segment(Plain):
    """A unit of text with an identity: its token ids, tokenized on their own. The name is for people."""

    token_ids: tuple[int, ...]
    name: str | None = None

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.token_ids[:MAX_SHOWN]))
        more = ", ..." if len(self.token_ids) > MAX_SHOWN else ""
        return f"Segment({self.name!r}, {len(self.token_ids)} tokens: {first}{more})"

    def digest(self, namespace: str) -> str:
        """Hex SHA-256 over a domain tag, the length-prefixed namespace and the ids as little-endian int32.

        Raises:
            OverflowError: a token id does not fit int32.
        """
        owner = namespace.encode()
        ids = np.array(self.token_ids, dtype="<i4").tobytes()
        return hashlib.sha256(_DOMAIN + struct.pack("<Q", len(owner)) + owner + ids).hexdigest()


Prompt: TypeAlias = str | Sequence[int] | Sequence[Segment]
"""What users give as a prompt: one text, token ids, or segments."""


def token_ids_of(segments: Iterable[Segment]) -> list[int]:
    """The ids of segments one after the other."""
    return [token for segment in segments for token in segment.token_ids]
