"""Sealed files: safetensors with a JSON header, every byte of which is covered by a digest.

The metadata of such a file holds three texts: the format's version under the format's own key, `header` (JSON), and
`header_blake3`, the BLAKE3 (hex) of that JSON. The header in turn carries the digest of the tensors. Only regular files
are read, memory-mapped; nothing in them is executed, and writing is atomic. What a header says and what tensors there
must be is the format's matter; a file that is foreign, truncated, altered or newer is refused with the format's errors.
The same content as bytes, for stores that are no folders, is `packed` and `unpacked`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from kvcomm.errors import KVCommError
from kvcomm.files.reading import BadContent, open_regular, path_of
from kvcomm.files.writing import NameTaken, replacing
from kvcomm.memory.packed import Packed, pack, tensor_bytes, unpack, unpack_metadata

if TYPE_CHECKING:
    from torch import Tensor

MAX_REPLACEMENTS = 20
"""A file replaced while it is read may look corrupt, as safetensors opens it twice; it is read again so often."""

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

    def write(self, file: Path, header: str, tensors: Mapping[str, Tensor], *, is_new: bool = False) -> None:
        """Write a file; it appears whole or not at all.

        Args:
            is_new: do not replace a file that is there by the time this one is written.

        Raises:
            NameTaken: `is_new`, and there is one.
            KVCommError: `failed`; an older file of that name is untouched.
        """
        from safetensors.torch import save_file

        metadata = self._metadata(header)
        try:
            with replacing(file, is_new=is_new) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except NameTaken:
            raise
        except OSError as error:
            raise self.failed(f"{file} cannot be written: {error.strerror or error}") from error
        except SafetensorError as error:
            raise self.failed(f"{file} cannot be written: {error}") from error

    @contextlib.contextmanager
    def opened(self, file: Path) -> Iterator[safe_open]:
        """The mapped file. Raises `failed` or `corrupt`."""
        try:
            with open_regular(file) as stream, safe_open(path_of(stream, file), framework="pt") as mapped:
                yield mapped
        except (SafetensorError, RuntimeError) as error:
            raise self.corrupt(f"{file} is not a whole safetensors file ({error})") from error
        except OSError as error:
            raise self.failed(f"{file} cannot be read: {error.strerror or error}") from error

    def packed(
        self, header: str, tensors: Mapping[str, Tensor], notes: Callable[[str], Mapping[str, str]] | None = None
    ) -> list[memoryview]:
        """The parts of sealed bytes, in order; tensors are not copied.

        Args:
            notes: further metadata, given the digest of the header; no digest covers them.

        Raises:
            ValueError: a dtype has no name in safetensors.
        """
        metadata = self._metadata(header)
        return pack(tensors, metadata | dict(notes(metadata["header_blake3"]) if notes else {}))

    def unpacked(self, source: object, content: memoryview) -> Packed:
        """What sealed bytes hold; the tensors are views of them and not looked at.

        Args:
            source: what they are called in errors.
            content: writable; see `packed.unpack`.

        Raises:
            KVCommError: `corrupt`.
        """
        try:
            return unpack(content)
        except BadContent as error:
            raise self.corrupt(f"{source} is not a whole safetensors file ({error})") from error

    def unpacked_metadata(self, source: object, content: memoryview) -> dict[str, str]:
        """The metadata of sealed bytes of which the first `header_bytes` are there. Raises `corrupt`."""
        try:
            return unpack_metadata(content)
        except BadContent as error:
            raise self.corrupt(f"{source} is not a whole safetensors file ({error})") from error

    def header(self, file: Path, opened: safe_open) -> str:
        """The header's JSON, which is what was written. Raises `corrupt` or `too_new`."""
        return self.checked_header(file, opened.metadata() or {})

    def checked_header(self, file: object, metadata: Mapping[str, str]) -> str:
        """The header's JSON in these metadata. Raises `corrupt` or `too_new`."""
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

    def _metadata(self, header: str) -> dict[str, str]:
        return {
            self.version_key: str(self.version),
            "header": header,
            "header_blake3": blake3(header.encode()).hexdigest(),
        }

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


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """BLAKE3 (hex) over dtype, shape and bytes of tensors, in order."""
    digest = blake3()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _version(file: Path) -> tuple[int, int, int] | None:
    """Tells one version of a file from the next; None: there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
