"""Snapshots: a context made durable.

A snapshot is one safetensors file: per layer `keys.<layer>` and `values.<layer>` as [num_computed, num_kv_heads, dim],
optionally `logits` [vocab_size] behind the last token, and in the metadata

    kvcomm_snapshot   format version, decimal
    header            JSON of `SnapshotHeader`
    header_blake3     BLAKE3 (hex) of that JSON text

The header carries the BLAKE3 of dtype, shape and bytes of all tensors, in the order of `_tensor_names`. Files are
memory-mapped on reading, nothing in them is executed, and every byte is covered: a file that is foreign, truncated,
altered or newer is refused by name. Writing is atomic. This module knows tensors and headers, not pools, contexts or
engines.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomm.errors import SnapshotCorrupt, SnapshotError, SnapshotForeign, SnapshotTooNew
from kvcomm.memory.fidelity import Fidelity

FORMAT_VERSION = 1
VERSION_KEY = "kvcomm_snapshot"
SUFFIX = ".safetensors"

MAX_REPLACEMENTS = 20
"""A file replaced while it is read looks corrupt, because safetensors opens it twice; it is read again so often."""


class SegmentRecord(BaseModel):
    """One step of the path: how many tokens it has and what it was called."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_tokens: NonNegativeInt
    name: str | None


class SnapshotHeader(BaseModel):
    """What a snapshot says of itself. `num_computed` leading tokens have KV in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    namespace: str
    architecture: str
    dtype: str
    name: str | None
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
    digest = blake3()
    for tensor in _tensors(keys, values, logits):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)
    return digest.hexdigest()


def write_snapshot(
    file: Path,
    header: SnapshotHeader,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    logits: Tensor | None,
) -> None:
    """Write a snapshot; it appears whole or not at all. The header's payload digest is filled in here.

    Raises:
        SnapshotError: the file cannot be written; an older file of that name is untouched.
    """
    digest = payload_digest(keys, values, logits)
    text = header.model_copy(update={"payload_blake3": digest}).model_dump_json()
    metadata = {
        VERSION_KEY: str(FORMAT_VERSION),
        "header": text,
        "header_blake3": blake3(text.encode()).hexdigest(),
    }
    tensors = dict(zip(_tensor_names(len(keys), logits is not None), _tensors(keys, values, logits), strict=True))
    with _atomic(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_header(file: Path) -> SnapshotHeader:
    """The header alone, without looking at the tensors.

    Raises:
        SnapshotError: unreadable, not a snapshot, altered or too new; see the subclasses.
    """
    with _opened(file) as opened:
        return _header(file, opened)


def read_snapshot(
    file: Path, *, namespace: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> Snapshot:
    """Map a snapshot and check every byte of it.

    Args:
        namespace: the only one accepted.
        shapes: per layer (num_kv_heads, key_dim, value_dim) as the model has them.
        dtype: of the KV as the model has it.

    Raises:
        SnapshotForeign: another namespace.
        SnapshotCorrupt, SnapshotTooNew, SnapshotError: as the names say.
    """
    for _ in range(MAX_REPLACEMENTS):
        version = _version(file)
        try:
            return _read(file, namespace, shapes, dtype)
        except SnapshotCorrupt:
            if _version(file) == version:
                raise
    raise SnapshotError(f"{file} is replaced all the time; read it when nobody writes it")


def _read(file: Path, namespace: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Snapshot:
    with _opened(file) as opened:
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
    if payload_digest(keys, values, logits) != header.payload_blake3:
        raise SnapshotCorrupt(f"{file} was altered: its tensors do not have the digest in the header")
    return Snapshot(header, keys, values, logits)


def _tensor_names(num_layers: int, has_logits: bool) -> list[str]:
    layers = range(num_layers)
    return [f"keys.{i}" for i in layers] + [f"values.{i}" for i in layers] + ["logits"] * has_logits


def _tensors(keys: Sequence[Tensor], values: Sequence[Tensor], logits: Tensor | None) -> list[Tensor]:
    return [*keys, *values] + ([] if logits is None else [logits])


def _version(file: Path) -> tuple[int, int, int] | None:
    """Tells one version of a file from the next; None: there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, RuntimeError) as error:
        raise SnapshotCorrupt(f"{file} is not a whole safetensors file ({error})") from error
    except OSError as error:
        raise SnapshotError(f"{file} cannot be read: {error.strerror or error}") from error


def _header(file: Path, opened: safe_open) -> SnapshotHeader:
    metadata = opened.metadata() or {}
    version, text = metadata.get(VERSION_KEY), metadata.get("header", "")
    if version is None:
        raise SnapshotCorrupt(f"{file} is a safetensors file but not a kvcomm snapshot")
    if not version.isascii() or not version.isdecimal() or len(version) > 9:
        raise SnapshotCorrupt(f"{file} has no readable format version: {version!r}")
    if int(version) > FORMAT_VERSION:
        raise SnapshotTooNew(
            f"{file} has format version {version}, this kvcomm reads up to {FORMAT_VERSION}; update it"
        )
    if blake3(text.encode()).hexdigest() != metadata.get("header_blake3") or int(version) != FORMAT_VERSION:
        raise SnapshotCorrupt(f"{file} was altered: its header does not have its digest")
    try:
        header = SnapshotHeader.model_validate_json(text)
    except ValidationError as error:
        raise SnapshotCorrupt(f"{file} has a header that does not fit the format: {error}") from error
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


@contextlib.contextmanager
def _atomic(file: Path) -> Iterator[Path]:
    """A temporary file beside the target that replaces it when the block succeeds and vanishes when it does not."""
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        temporary.replace(file)
    except OSError as error:
        raise SnapshotError(f"{file} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise SnapshotError(f"{file} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
