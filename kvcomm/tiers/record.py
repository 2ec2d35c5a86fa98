"""What one object of a tier holds: a sealed header that says all about it, and tensors.

A record is sealed bytes (`kvcomm.memory.sealed_file`). `RecordHeader` carries kind, producer, namespace, fidelity,
tokens, place, shapes, dtype and the digest of the tensors: `keys.<layer>` and `values.<layer>`, or `blob` (bytes). Its
seal, in the metadata, binds the header to the object's name under the tenant's key. This module knows neither stores
nor what is wanted; reading checks that a record is whole, the tier that it is the right one.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError

from kvcomm.errors import RecordCorrupt, RecordError, RecordTooNew
from kvcomm.files.reading import first_fault
from kvcomm.files.records import StrictRecord
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.sealed_file import SealedFormat, tensors_digest
from kvcomm.tiers.space import KV, TierSpace

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = SealedFormat("tier record", "kvcomm_tier", 1, RecordError, RecordCorrupt, RecordTooNew)
SEAL = "seal"
BLOB = "blob"

BlobKind = Literal["snapshot", "bank", "prior", "reader"]
RecordKind = Literal["prefix", "rendition", "snapshot", "bank", "prior", "reader"]
BLOB_KINDS: tuple[BlobKind, ...] = get_args(BlobKind)

TokenIds = tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
Seal = Callable[[str], str]
"""The seal of a header, by its digest."""


class NamedSegment(StrictRecord):
    """A segment that stood before a rendition."""

    token_ids: TokenIds
    name: str | None


class RenditionPart(StrictRecord):
    """What a rendition's header has besides; see `kvcomm.tiers.space.StoredRendition`."""

    digest: str
    signature: str
    slot: str
    before: tuple[NamedSegment, ...]
    risk: NonNegativeFloat


class RecordHeader(StrictRecord):
    """What a record says of itself.

    Attributes:
        token_ids: whose KV it holds.
        start: position of the first one.
        parent: of a run of a prefix, what its name was made from besides its tokens; else empty.
        name: of a blob, as its user gave it; else empty.
        shapes: per layer (num_kv_heads, key_dim, value_dim).
    """

    kind: RecordKind
    producer: str
    namespace: str
    fidelity: Fidelity
    dtype: str
    shapes: tuple[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt], ...]
    vocab_size: NonNegativeInt
    token_ids: TokenIds = ()
    start: NonNegativeInt = 0
    parent: str = ""
    name: str = ""
    rendition: RenditionPart | None = None
    created: str
    payload_blake3: str

    def is_of(self, space: TierSpace) -> bool:
        """Whether it was made for a space; the tenant is in its name only."""
        return (self.namespace, self.producer, self.dtype, self.vocab_size, self.shapes) == (
            space.namespace,
            space.producer,
            space.dtype_name,
            space.vocab_size,
            tuple(map(tuple, space.shapes)),
        )


class Record(NamedTuple):
    """A whole record; tensors are views of the bytes that it was read from."""

    header: RecordHeader
    tensors: dict[str, Tensor]
    seal: str
    header_digest: str

    def is_sealed(self, seal: Seal) -> bool:
        """Whether it was sealed so."""
        return hmac.compare_digest(self.seal.encode(), seal(self.header_digest).encode())

    def kv(self) -> KV:
        """The keys and values of a prefix or rendition."""
        layers = range(len(self.header.shapes))
        return KV([self.tensors[f"keys.{i}"] for i in layers], [self.tensors[f"values.{i}"] for i in layers])

    def blob(self) -> bytes:
        """The bytes of everything else."""
        return self.tensors[BLOB].numpy().tobytes()


def header_of(space: TierSpace, kind: RecordKind, **parts: object) -> RecordHeader:
    """A header for a space; the digest is filled in when it is packed."""
    values = {
        "kind": kind,
        "producer": space.producer,
        "namespace": space.namespace,
        "fidelity": Fidelity.EXACT,
        "dtype": space.dtype_name,
        "shapes": tuple(map(tuple, space.shapes)),
        "vocab_size": space.vocab_size,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "payload_blake3": "",
    }
    return RecordHeader.model_validate(values | parts)


def pack_kv(header: RecordHeader, kv: KV, seal: Seal) -> list[memoryview]:
    """The parts of a record of KV, in order; KV that is contiguous is not copied."""
    return _packed(header, _kv_tensors(kv.keys, kv.values), seal)


def pack_blob(header: RecordHeader, content: bytes, seal: Seal) -> list[memoryview]:
    """The parts of a record of bytes, in order."""
    import torch

    blob = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return _packed(header, {BLOB: blob}, seal)


def unpack_record(source: object, content: memoryview) -> Record:
    """A record, every byte of which is checked: header and tensors have their digests, names and shapes.

    Args:
        source: what it is called in errors.
        content: writable; nothing writes it.

    Raises:
        RecordCorrupt, RecordTooNew: as the names say.
    """
    metadata, tensors = FORMAT.unpacked(source, content)
    header = _header(source, metadata)
    names = _names(header)
    if set(tensors) != set(names):
        raise RecordCorrupt(f"{source} does not hold the tensors of its header")
    ordered = {name: tensors[name] for name in names}
    _require_shapes(source, header, ordered)
    if tensors_digest(ordered.values()) != header.payload_blake3:
        raise RecordCorrupt(f"{source} was altered: its tensors do not have the digest in the header")
    return Record(header, ordered, metadata.get(SEAL, ""), metadata["header_blake3"])


def unpack_header(source: object, content: memoryview) -> tuple[RecordHeader, Mapping[str, str]]:
    """The header by the leading bytes of a record, and its metadata; the tensors are not looked at.

    Raises:
        RecordCorrupt, RecordTooNew: as the names say.
    """
    metadata = FORMAT.unpacked_metadata(source, content)
    return _header(source, metadata), metadata


def _packed(header: RecordHeader, tensors: dict[str, Tensor], seal: Seal) -> list[memoryview]:
    text = header.model_copy(update={"payload_blake3": tensors_digest(tensors.values())}).model_dump_json()
    return FORMAT.packed(text, tensors, lambda digest: {SEAL: seal(digest)})


def _kv_tensors(keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {f"keys.{i}": key.contiguous() for i, key in enumerate(keys)}
    return named | {f"values.{i}": value.contiguous() for i, value in enumerate(values)}


def _names(header: RecordHeader) -> list[str]:
    if header.kind in BLOB_KINDS:
        return [BLOB]
    layers = range(len(header.shapes))
    return [f"keys.{i}" for i in layers] + [f"values.{i}" for i in layers]


def _header(source: object, metadata: Mapping[str, str]) -> RecordHeader:
    text = FORMAT.checked_header(source, metadata)
    try:
        return RecordHeader.model_validate_json(text)
    except ValidationError as error:
        raise RecordCorrupt(f"{source} has a header that does not fit the format: {first_fault(error)}") from error


def _require_shapes(source: object, header: RecordHeader, tensors: dict[str, Tensor]) -> None:
    from kvcomm.memory.pool import LayerShape

    if header.kind in BLOB_KINDS:
        if str(tensors[BLOB].dtype) != "torch.uint8" or tensors[BLOB].dim() != 1:
            raise RecordCorrupt(f"{source}: its bytes are {tuple(tensors[BLOB].shape)} {tensors[BLOB].dtype}")
        return
    for layer, (num_heads, key_dim, value_dim) in enumerate(map(LayerShape._make, header.shapes)):
        for kind, dim in (("keys", key_dim), ("values", value_dim)):
            tensor, wanted = tensors[f"{kind}.{layer}"], (len(header.token_ids), num_heads, dim)
            if tuple(tensor.shape) != wanted or str(tensor.dtype) != f"torch.{header.dtype}":
                raise RecordCorrupt(
                    f"{source}: {kind} of layer {layer} are {tuple(tensor.shape)} {tensor.dtype}, not {wanted} "
                    f"{header.dtype}"
                )
