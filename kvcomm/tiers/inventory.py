"""What lies in a store, told by the objects' names and headers; needs no secret, and no model.

Names are opaque without their tenant's secret, but headers say what an object is. Whether it is whole is found out by
reading it; whether its seal is right only its tenant's tier can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from kvcomm.errors import ObjectMissing, RecordError
from kvcomm.files.reading import BadContent
from kvcomm.memory.packed import header_bytes
from kvcomm.plain import Plain
from kvcomm.tiers.keys import ROOT
from kvcomm.tiers.record import RecordHeader, RecordKind, unpack_header, unpack_record
from kvcomm.tiers.store import ObjectStore, StoredObject

HEADER_GUESS = 16 * 2**10
"""Leading bytes of a record that are read for its header; more where it is longer."""
OTHER = "other"
KINDS: tuple[str, ...] = (*get_args(RecordKind), OTHER)


@dataclass(frozen=True)
class Entry(Plain):
    """One object.

    Attributes:
        kind: by its header, or by its name where that cannot be read.
        num_tokens: whose KV it holds.
        name: of a blob.
        refusal: why it cannot be used; None: it can, as far as was looked.
    """

    key: str
    kind: str
    num_bytes: int
    modified_s: float
    used_s: float
    num_tokens: int = 0
    start: int = 0
    producer: str = ""
    namespace: str = ""
    fidelity: str = ""
    name: str = ""
    created: str = ""
    refusal: str | None = None


@dataclass(frozen=True)
class KindTotal(Plain):
    """Objects of one kind together."""

    kind: str
    num_objects: int
    num_bytes: int


@dataclass(frozen=True)
class Totals(Plain):
    """A store as a whole.

    Attributes:
        spaces: tenants of models, of one producer each, whose objects are there.
        oldest_s, newest_s: when an object was written, in seconds since 1970; None: there is none.
    """

    num_objects: int
    num_bytes: int
    spaces: int
    kinds: tuple[KindTotal, ...]
    oldest_s: float | None
    newest_s: float | None


def entries(store: ObjectStore, *, is_thorough: bool = False) -> Iterator[Entry]:
    """Every object of kvcomm's, in the order of names.

    Args:
        is_thorough: read and check all bytes of each, else only its header.

    Raises:
        StoreFailed: the store cannot be listed or read.
    """
    for found in sorted(store.list(ROOT)):
        try:
            yield _entry(found, checked_header(store, found.key) if is_thorough else read_header(store, found.key))
        except ObjectMissing:  # removed meanwhile
            continue
        except (RecordError, BadContent) as error:
            yield Entry(
                found.key, kind_of(found.key), found.num_bytes, found.modified_s, found.used_s, refusal=str(error)
            )


def totals(store: ObjectStore) -> Totals:
    """How much there is, by names alone.

    Raises:
        StoreFailed: the store cannot be listed.
    """
    found = list(store.list(ROOT))
    by_kind = {kind: [each.num_bytes for each in found if kind_of(each.key) == kind] for kind in KINDS}
    times = [each.modified_s for each in found]
    return Totals(
        num_objects=len(found),
        num_bytes=sum(each.num_bytes for each in found),
        spaces=len({each.key.split("/")[1] for each in found}),
        kinds=tuple(KindTotal(kind, len(sizes), sum(sizes)) for kind, sizes in by_kind.items() if sizes),
        oldest_s=min(times, default=None),
        newest_s=max(times, default=None),
    )


def read_header(store: ObjectStore, key: str) -> RecordHeader:
    """The header of an object, by its leading bytes.

    Raises:
        ObjectMissing, StoreFailed: of the store.
        RecordError, BadContent: it is no record that can be used.
    """
    return unpack_header(key, leading_bytes(store, key))[0]


def checked_header(store: ObjectStore, key: str) -> RecordHeader:
    """The header of an object all of whose bytes were read and checked; raises as `read_header`."""
    return unpack_record(key, store.get(key)).header


def leading_bytes(store: ObjectStore, key: str) -> memoryview:
    """The bytes of an object that hold its header, and perhaps more.

    Raises:
        ObjectMissing, StoreFailed: of the store.
        BadContent: they do not say how long the header is.
    """
    content = store.get_range(key, 0, HEADER_GUESS)
    num_bytes = header_bytes(content)
    return content if num_bytes <= len(content) else store.get_range(key, 0, num_bytes)


def kind_of(key: str) -> str:
    """The kind of an object by its name."""
    parts = key.split("/")
    return parts[2] if len(parts) > 3 and parts[2] in KINDS else OTHER


def _entry(found: StoredObject, header: RecordHeader) -> Entry:
    return Entry(
        key=found.key,
        kind=header.kind,
        num_bytes=found.num_bytes,
        modified_s=found.modified_s,
        used_s=found.used_s,
        num_tokens=len(header.token_ids),
        start=header.start,
        producer=header.producer,
        namespace=header.namespace,
        fidelity=header.fidelity,
        name=header.name,
        created=header.created,
    )
