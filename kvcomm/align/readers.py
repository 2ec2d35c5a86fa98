"""Readers: who reads a prompt, told by the template before, between and behind its slots.

Calibration belongs to readers. Not part of one are the texts in the slots, the number of documents in a row, where
their KV comes from and whether that is exact: prompts that differ in these are examples of the same thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvcomm.align.edges import signatures
from kvcomm.align.slot_kinds import kind_of
from kvcomm.memory.segments import Segment

_DOMAIN = b"kvcomm reader 1\0"


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        digest: hex SHA-256 of its template.
        slots: kinds of its slots in order, a row of the same kind once; for people.
        targets: signatures of these slots, to which the edges of what is moved into them lead.
    """

    digest: str
    slots: tuple[str, ...] = ()
    targets: tuple[str, ...] = field(default=(), compare=False)


def reader_of(segments: Sequence[Segment]) -> Reader:
    """The reader of a prompt. Cutting static text differently changes nothing, nor does what stands in the slots.

    A slot in which nothing stands has to be there as a segment without tokens: without it this is another template.
    """
    running = hashlib.sha256(_DOMAIN)
    slots: list[str] = []
    for part in template_of(segments):
        if isinstance(part, str):
            slots.append(part)
            running.update(b"slot" + _sized(part.encode()))
        else:
            running.update(b"text" + _sized(part.tobytes()))
    named = zip(segments, signatures(segments), strict=True)
    targets = dict.fromkeys(signature for segment, signature in named if segment.name is not None)
    return Reader(running.hexdigest(), tuple(slots), tuple(targets))


def template_of(segments: Sequence[Segment]) -> Iterator[str | np.ndarray]:
    """Static text as token ids, int32, and kinds of slots in turn; first and last is static text, maybe none.

    Slots of one kind in a row count once, and what stands between them not at all: three documents and five are read by
    the same reader, whatever numbers stand before them.
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


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data
