"""Readers: who reads a prompt, told by the template before, between and behind its slots.

Calibration belongs to readers. Which texts fill the slots, how many documents stand in a row, where their KV comes from
and whether that is exact is not part of a reader: prompts that differ in these are examples of one thing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvcomm.memory.segments import Segment

_DOMAIN = b"kvcomm reader 1\0"
_NUMBERED = re.compile(r"^(.*?[^\W\d_])[\W_]*\d+$")


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        digest: hex SHA-256 of its template.
        slots: kinds of its slots in order, a row of the same kind once; for people.
    """

    digest: str
    slots: tuple[str, ...] = ()


def reader_of(segments: Sequence[Segment]) -> Reader:
    """The reader of a prompt. Cutting static text differently changes nothing."""
    running, slots = hashlib.sha256(_DOMAIN), []
    for part in template_of(segments):
        if isinstance(part, str):
            slots.append(part)
            running.update(b"slot" + _sized(part.encode()))
        else:
            running.update(b"text" + _sized(part.tobytes()))
    return Reader(running.hexdigest(), tuple(slots))


def template_of(segments: Sequence[Segment]) -> Iterator[str | np.ndarray]:
    """Static text and kinds of slots in turn; slots of one kind in a row, and what stands between them, count once.

    So three documents and five are read by the same reader, whatever numbers stand before them.
    """
    static: list[int] = []
    last: str | None = None
    for segment in segments:
        if segment.name is None:
            static += segment.token_ids
            continue
        kind = kind_of(segment.name)
        if kind != last:
            yield np.array(static, dtype="<i4")
            yield kind
        static, last = [], kind
    yield np.array(static, dtype="<i4")


@lru_cache(maxsize=4096)
def kind_of(slot: str) -> str:
    """What kind of slot a name stands for: "document_3" and "document 12" are both a "document"."""
    found = _NUMBERED.match(slot)
    return found.group(1) if found else slot


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data
