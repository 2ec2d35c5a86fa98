"""Sealed files: safetensors with a JSON header, every byte of which is covered by a digest.

The metadata of such a file holds three texts: the format's version under the format's own key, `header` (JSON), and
`header_blake3`, the BLAKE3 (hex) of that JSON. The header in turn carries the digest of the tensors. Files are
memory-mapped on reading, nothing in them is executed, and writing is atomic. What a header says and what tensors there
must be is the format's matter; a file that is foreign, truncated, altered or newer is refused with the format's errors.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomm.errors import KVCommError

MAX_REPLACEMENTS = 20
"""A file replaced while it is read looks corrupt, because safetensors opens it twice; it is read again so often."""

Read = TypeVar("Read")


class SealedFormat(NamedTuple):
    """One kind of sealed file.

    Attributes:
        what: what such a file is called in errors.
        version_key: of the metadata.
        version: written, and the newest one read.
        failed, corrupt, too_new: raised when a file cannot be read or written, is damaged or foreign, or is newer.
    """

    what: str
    version_key: str
    version: int
    failed: type[KVCommError]
    corrupt: type[KVCommError]
    too_new: type[KVCommError]

    def write(self, file: Path, header: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file; it appears whole or not at all.

        Raises:
            KVCommError: `failed`; an older file of that name is untouched.
        """
        metadata = {
            self.version_key: str(self.version),
            "header": header,
            "header_blake3": blake3(header.encode()).hexdigest(),
        }
        with self._atomic(file) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    @contextlib.contextmanager
    def opened(self, file: Path) -> Iterator[safe_open]:
        """The mapped file. Raises `failed` or `corrupt`."""
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, RuntimeError) as error:
            raise self.corrupt(f"{file} is not a whole safetensors file ({error})") from error
        except OSError as error:
            raise self.failed(f"{file} cannot be read: {error.strerror or error}") from error

    def header(self, file: Path, opened: safe_open) -> str:
        """The header's JSON, which is what was written. Raises `corrupt` or `too_new`."""
        metadata = opened.metadata() or {}
        version, text = metadata.get(self.version_key), metadata.get("header", "")
        if version is None:
            raise self.corrupt(f"{file} is a safetensors file but not a kvcomm {self.what}")
        if not version.isascii() or not version.isdecimal() or len(version) > 9:
            raise self.corrupt(f"{file} has no readable format version: {version!r}")
        if int(version) > self.version:
            raise self.too_new(
                f"{file} has format version {version}, this kvcomm reads up to {self.version}; update it"
            )
        if blake3(text.encode()).hexdigest() != metadata.get("header_blake3") or int(version) != self.version:
            raise self.corrupt(f"{file} was altered: its header does not have its digest")
        return str(text)

    def settled(self, file: Path, read: Callable[[], Read]) -> Read:
        """`read()`, again as long as the file is replaced meanwhile. Raises what it raises, or `failed`."""
        for _ in range(MAX_REPLACEMENTS):
            version = _version(file)
            try:
                return read()
            except self.corrupt:
                if _version(file) == version:
                    raise
        raise self.failed(f"{file} is replaced all the time; read it when nobody writes it")

    @contextlib.contextmanager
    def _atomic(self, file: Path) -> Iterator[Path]:
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
            raise self.failed(f"{file} cannot be written: {error.strerror or error}") from error
        except SafetensorError as error:
            raise self.failed(f"{file} cannot be written: {error}") from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """BLAKE3 (hex) over dtype, shape and bytes of tensors, in order."""
    digest = blake3()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)
    return digest.hexdigest()


def _version(file: Path) -> tuple[int, int, int] | None:
    """Tells one version of a file from the next; None: there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
