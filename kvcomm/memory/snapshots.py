"""Snapshots: a context made durable.

A snapshot is one sealed file (`sealed_file`): per layer `keys.<layer>` and `values.<layer>` as
[num_computed, num_kv_heads, dim], optionally `logits` [vocab_size] behind the last token, finite and in the dtype of
the KV or float32, and as header the JSON of `SnapshotHeader`, which carries the digest of all tensors in the order of
`_tensor_names`. This module knows tensors and headers, not pools, contexts or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field, NonNegativeInt, ValidationError
from safetensors import safe_open

from kvcomm.errors import SnapshotCorrupt, SnapshotError, SnapshotExists, SnapshotForeign, SnapshotTooNew
from kvcomm.files.reading import first_fault
from kvcomm.files.records import StrictRecord
from kvcomm.files.writing import NameTaken
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.sealed_file import SealedFormat, tensors_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT_VERSION = 1
VERSION_KEY = "kvcomm_snapshot"
SUFFIX = ".safetensors"

FORMAT = SealedFormat("snapshot", VERSION_KEY, FORMAT_VERSION, SnapshotError, SnapshotCorrupt, SnapshotTooNew)


class SegmentRecord(StrictRecord):
    """One step of the path: how many tokens it has and what it was called."""

    num_tokens: NonNegativeInt
    name: str | None


class SnapshotHeader(StrictRecord):
    """What a snapshot says of itself. `num_computed` leading tokens have KV in the file, `note` is its user's."""

    namespace: str
    architecture: str
    dtype: str
    name: str | None
    note: str | None = None
    token_ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    num_computed: NonNegativeInt
    path: tuple[SegmentRecord, ...]
    fidelity: Fidelity
    created: str
    payload_blake3: str


class Snapshot(NamedTuple):
    """A checked snapshot; tensors are views of the mapped file."""

    header: SnapshotHeader
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor | None


def payload_digest(keys: Sequence[Tensor], values: Sequence[Tensor], logits: Tensor | None) -> str:
    """BLAKE3 (hex) over dtype, shape and bytes of all tensors: keys layer by layer, then values, then logits."""
    return tensors_digest(_tensors(keys, values, logits))


def write_snapshot(
    file: Path,
    header: SnapshotHeader,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    logits: Tensor | None,
    *,
    is_new: bool = False,
) -> None:
    """Write a snapshot; it appears whole or not at all. The header's payload digest is filled in here.

    Args:
        logits: left out where they are not finite: whoever needs them computes them again.
        is_new: do not replace a file that is there by the time this one is written.

    Raises:
        SnapshotExists: `is_new`, and there is one.
        SnapshotError: the file cannot be written; an older file of that name is untouched.
    """
    logits = logits if logits is not None and bool(logits.isfinite().all()) else None
    digest = payload_digest(keys, values, logits)
    text = header.model_copy(update={"payload_blake3": digest}).model_dump_json()
    tensors = dict(zip(_tensor_names(len(keys), logits is not None), _tensors(keys, values, logits), strict=True))
    try:
        FORMAT.write(file, text, tensors, is_new=is_new)
    except NameTaken as error:
        raise SnapshotExists(f"{file} exists; choose another name, or replace it") from error


def read_header(file: str | Path) -> SnapshotHeader:
    """The header alone, without looking at the tensors.

    Raises:
        SnapshotError: unreadable, not a snapshot, altered or too new; see the subclasses.
    """
    file = Path(file)
    with FORMAT.opened(file) as opened:
        return _header(file, opened)


def read_snapshot(
    file: Path, *, namespace: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, vocab_size: int
) -> Snapshot:
    """Map a snapshot and check every byte of it.

    Args:
        namespace: the only one accepted.
        shapes: per layer (num_kv_heads, key_dim, value_dim) as the model has them.
        dtype: of the KV as the model has it.
        vocab_size: tokens that the model knows.

    Raises:
        SnapshotForeign: another namespace.
        SnapshotCorrupt, SnapshotTooNew, SnapshotError: as the names say.
    """
    return FORMAT.settled(file, lambda: _read(file, namespace, shapes, dtype, vocab_size))


def _read(
    file: Path, namespace: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, vocab_size: int
) -> Snapshot:
    with FORMAT.opened(file) as opened:
        header = _header(file, opened)
        if header.namespace != namespace:
            raise SnapshotForeign(
                f"{file} belongs to another namespace ({header.architecture}, {header.dtype}, "
                f"{header.namespace[:12]}, wanted {namespace[:12]}): model, dtype, rope, tokenizer or tenant differ"
            )
        names = set(opened.keys())
        has_logits = "logits" in names
        if names != set(_tensor_names(len(shapes), has_logits)):
            raise SnapshotCorrupt(f"{file} does not hold the tensors of {len(shapes)} layers")
        keys = [opened.get_tensor(f"keys.{layer}") for layer in range(len(shapes))]
        values = [opened.get_tensor(f"values.{layer}") for layer in range(len(shapes))]
        logits = opened.get_tensor("logits") if has_logits else None
    _require_shapes(file, header, keys, values, shapes, dtype)
    if logits is not None and (
        tuple(logits.shape) != (vocab_size,) or str(logits.dtype) not in (str(dtype), "torch.float32")
    ):
        raise SnapshotCorrupt(
            f"{file}: logits are {tuple(logits.shape)} {logits.dtype}, not ({vocab_size},) {dtype} or torch.float32"
        )
    if payload_digest(keys, values, logits) != header.payload_blake3:
        raise SnapshotCorrupt(f"{file} was altered: its tensors do not have the digest in the header")
    if max(header.token_ids, default=0) >= vocab_size:
        raise SnapshotCorrupt(f"{file} holds token {max(header.token_ids)}; the model knows {vocab_size} tokens")
    if logits is not None and not logits.isfinite().all():
        raise SnapshotCorrupt(f"{file}: logits are not finite")
    return Snapshot(header, keys, values, logits)


def _tensor_names(num_layers: int, has_logits: bool) -> list[str]:
    layers = range(num_layers)
    return [f"keys.{i}" for i in layers] + [f"values.{i}" for i in layers] + ["logits"] * has_logits


def _tensors(keys: Sequence[Tensor], values: Sequence[Tensor], logits: Tensor | None) -> list[Tensor]:
    return [*keys, *values] + ([] if logits is None else [logits])


def _header(file: Path, opened: safe_open) -> SnapshotHeader:
    text = FORMAT.header(file, opened)
    try:
        header = SnapshotHeader.model_validate_json(text)
    except ValidationError as error:
        raise SnapshotCorrupt(f"{file} has a header that does not fit the format: {first_fault(error)}") from error
    num_tokens = len(header.token_ids)
    if header.num_computed > num_tokens or sum(step.num_tokens for step in header.path) != num_tokens:
        raise SnapshotCorrupt(f"{file} has a header that contradicts itself about its {num_tokens} tokens")
    return header


def _require_shapes(
    file: Path,
    header: SnapshotHeader,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
) -> None:
    for layer, (num_heads, key_dim, value_dim) in enumerate(shapes):
        for kind, tensor, dim in (("keys", keys[layer], key_dim), ("values", values[layer], value_dim)):
            wanted = (header.num_computed, num_heads, dim)
            if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
                raise SnapshotCorrupt(
                    f"{file}: {kind} of layer {layer} are {tuple(tensor.shape)} {tensor.dtype}, not {wanted} {dtype}"
                )
