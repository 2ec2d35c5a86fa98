"""Anchor banks as files; the format is described in `anchors/FORMAT.md`.

A bank is one sealed file: sketches, codes and scales as tensors, and a header that says of which namespace and edge
they are. Every byte is covered by digests, nothing in the file is executed, and a file of another model, a truncated,
altered or newer one is refused by name.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveInt, ValidationError
from safetensors import safe_open
from torch import Tensor

from kvcomm.align.bank import BankShape, BankSnapshot
from kvcomm.align.edges import Edge
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign, AnchorFileTooNew, InvalidRequest
from kvcomm.files.reading import first_fault
from kvcomm.files.records import StrictRecord
from kvcomm.memory.sealed_file import SealedFormat, tensors_digest

FORMAT = SealedFormat("anchor bank", "kvcomm_anchors", 2, AnchorFileError, AnchorFileCorrupt, AnchorFileTooNew)
SUFFIX = ".anchors.safetensors"


class BankHeader(StrictRecord):
    """What a bank says of itself."""

    namespace: str
    source: str
    target: str
    slot: str
    source_slot: str
    num_tokens: NonNegativeInt
    num_groups: PositiveInt
    dim: PositiveInt
    keys: tuple[PositiveInt | None, ...]
    values: tuple[PositiveInt | None, ...]
    created: str
    payload_blake3: str

    @property
    def edge(self) -> Edge:
        """The edge the anchors were measured on."""
        return Edge(self.source, self.target, self.slot, self.source_slot)

    @property
    def shape(self) -> BankShape:
        """What the bank holds per token."""
        return BankShape(self.keys, self.values, self.num_groups, self.dim)


def save_bank(snapshot: BankSnapshot, shape: BankShape, namespace: str, file: Path) -> BankHeader:
    """Write a bank; the file appears whole or not at all.

    Raises:
        AnchorFileError: it cannot be written; an older file of that name is untouched.
    """
    tensors = _tensors(snapshot)
    edge = snapshot.edge
    header = BankHeader(
        namespace=namespace,
        source=edge.source,
        target=edge.target,
        slot=edge.slot,
        source_slot=edge.source_slot,
        num_tokens=snapshot.num_tokens,
        num_groups=shape.num_groups,
        dim=shape.dim,
        keys=shape.keys,
        values=shape.values,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        payload_blake3=tensors_digest(tensors.values()),
    )
    FORMAT.write(file, header.model_dump_json(), tensors)
    return header


def read_bank_header(file: Path) -> BankHeader:
    """The header alone, without looking at the tensors.

    Raises:
        AnchorFileError: unreadable, not a bank, altered or too new; see the subclasses.
    """
    with FORMAT.opened(file) as opened:
        return _header(file, opened)


def verify_bank(file: Path) -> BankHeader:
    """Check every byte of a bank, whosever it is.

    Raises:
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: as the names say.
    """
    header = read_bank_header(file)
    load_bank(file, namespace=header.namespace, shape=header.shape)
    return header


def load_bank(file: Path, *, namespace: str, shape: BankShape) -> BankSnapshot:
    """Read a bank and check every byte of it.

    Args:
        namespace, shape: the only ones accepted.

    Raises:
        AnchorFileForeign: of another namespace, or made with other sketches.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: as the names say.
    """
    return FORMAT.settled(file, lambda: _read(file, namespace, shape))


def require_namespace(file: Path, found: str, wanted: str) -> None:
    """Raises AnchorFileForeign for a file of another namespace."""
    if found != wanted:
        raise AnchorFileForeign(
            f"{file} belongs to another namespace ({found[:12]}, wanted {wanted[:12]}): "
            "model, dtype, rope, tokenizer or tenant differ"
        )


def _read(file: Path, namespace: str, shape: BankShape) -> BankSnapshot:
    with FORMAT.opened(file) as opened:
        header = _header(file, opened)
        require_namespace(file, header.namespace, namespace)
        if header.shape != shape:
            raise AnchorFileForeign(f"{file} holds anchors of another shape: {header.shape}, wanted {shape}")
        names = list(_wanted(header))
        if set(opened.keys()) != set(names):
            raise AnchorFileCorrupt(f"{file} does not hold the tensors its header announces")
        # Copies: a bank outlives the file it came from.
        tensors = {name: opened.get_tensor(name).clone() for name in names}
    snapshot = _snapshot(file, header, tensors)
    if tensors_digest(tensors.values()) != header.payload_blake3:
        raise AnchorFileCorrupt(f"{file} was altered: its tensors do not have the digest in the header")
    try:
        shape.require(snapshot.sketches, snapshot.offsets)
    except InvalidRequest as error:
        raise AnchorFileCorrupt(f"{file} contradicts its own header: {error}") from error
    return snapshot


def _header(file: Path, opened: safe_open) -> BankHeader:
    text = FORMAT.header(file, opened)
    try:
        return BankHeader.model_validate_json(text)
    except ValidationError as error:
        raise AnchorFileCorrupt(f"{file} has a header that does not fit the format: {first_fault(error)}") from error


def _tensors(snapshot: BankSnapshot) -> dict[str, Tensor]:
    found = {"sketches": snapshot.sketches, "texts": snapshot.texts}
    for kind, layers in (("keys", snapshot.offsets.keys), ("values", snapshot.offsets.values)):
        for layer, rows in enumerate(layers):
            if rows is not None:
                found[f"{kind}.{layer}.codes"] = rows.codes
                found[f"{kind}.{layer}.scales"] = rows.scales
    return found


def _snapshot(file: Path, header: BankHeader, tensors: dict[str, Tensor]) -> BankSnapshot:
    for name, (shape, dtype) in _wanted(header).items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise AnchorFileCorrupt(
                f"{file}: {name} is {tuple(tensor.shape)} {tensor.dtype}, which is not {shape} {dtype}"
            )

    def rows(kind: str, sizes: tuple[int | None, ...]) -> tuple[OffsetRows | None, ...]:
        return tuple(
            None if size is None else OffsetRows(tensors[f"{kind}.{layer}.codes"], tensors[f"{kind}.{layer}.scales"])
            for layer, size in enumerate(sizes)
        )

    offsets = OffsetTable(rows("keys", header.keys), rows("values", header.values))
    return BankSnapshot(header.edge, 0, tensors["sketches"], offsets, tensors["texts"])


def _wanted(header: BankHeader) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor."""
    num_tokens = header.num_tokens
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "sketches": ((header.num_groups, num_tokens, header.dim), torch.float32),
        "texts": ((num_tokens,), torch.int32),
    }
    for kind, sizes in (("keys", header.keys), ("values", header.values)):
        for layer, size in enumerate(sizes):
            if size is not None:
                wanted[f"{kind}.{layer}.codes"] = ((num_tokens, size), torch.int8)
                wanted[f"{kind}.{layer}.scales"] = ((num_tokens,), torch.float32)
    return wanted
