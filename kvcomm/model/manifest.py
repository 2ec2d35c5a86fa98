"""The manifest of a converted model folder: what it was made from, and the size and BLAKE3 digest of every
file.

A folder counts as ours only if its manifest is there, is of this format, names the same source, and every
file is present, of the recorded size and of the recorded digest, with none beside them. Half a gigabyte takes
about 0.1 s, so this is checked at every load and a flipped bit never reaches a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from blake3 import blake3
from pydantic import ValidationError

from kvcomm.files.reading import CONFIG_BYTES, read_bytes
from kvcomm.files.records import StrictRecord

MANIFEST_FILE = "manifest.json"
RECORDED_VERSIONS = ("torch", "transformers", "gguf")


class FileRecord(StrictRecord):
    """One file of the folder."""

    num_bytes: int
    blake3: str


class Manifest(StrictRecord):
    """The content of `manifest.json`, format version 1."""

    format: Literal["kvcomm-model"] = "kvcomm-model"
    format_version: Literal[1] = 1
    name: str
    source: dict[str, str]
    license: str
    files: dict[str, FileRecord]
    versions: dict[str, str]


class BadFolder(Exception):
    """A model folder is not what a manifest of ours describes; the text completes "FOLDER ..."."""


def write_manifest(folder: Path, *, name: str, source: Mapping[str, str], license_id: str) -> None:
    """Record every file of `folder` and put all of it on the disk (fsync), the manifest last."""
    files = {path.name: _record(path) for path in sorted(folder.iterdir())}
    versions = {package: version(package) for package in RECORDED_VERSIONS}
    manifest = Manifest(name=name, source=dict(source), license=license_id, files=files, versions=versions)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        sync(path)


def verify_folder(folder: Path, *, name: str, source: Mapping[str, str]) -> Manifest:
    """Check a folder against its manifest and against the source it should have been made from.

    Raises:
        BadFolder: it differs; the message says in what.
        OSError: it cannot be read.
    """
    manifest = _read(folder)
    if (manifest.name, manifest.source) != (name, dict(source)):
        raise BadFolder(f"was made from {manifest.name} {manifest.source}, expected {name} {dict(source)}")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST_FILE}
    if foreign := sorted(present - manifest.files.keys()):
        raise BadFolder(f"holds {foreign[0]}, which its manifest does not list")
    for file_name, expected in manifest.files.items():
        _check_file(folder / file_name, expected)
    return manifest


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(read_bytes(path, max_bytes=CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFolder(f"has no {MANIFEST_FILE}, so kvcomm did not make it or did not finish") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadFolder(
            f"has a {MANIFEST_FILE} that this version cannot use ({where or 'JSON'}: {first['msg']})"
        ) from error


def _check_file(path: Path, expected: FileRecord) -> None:
    if not path.is_file():
        raise BadFolder(f"lacks {path.name}")
    num_bytes = path.stat().st_size
    if num_bytes != expected.num_bytes:
        raise BadFolder(f"holds {path.name} of {num_bytes:,} bytes, expected {expected.num_bytes:,}")
    if file_digest(path) != expected.blake3:
        raise BadFolder(f"holds an altered {path.name} (its BLAKE3 digest differs)")


def file_digest(path: Path) -> str:
    """BLAKE3 of a file, hex; memory-mapped and on all cores."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _record(path: Path) -> FileRecord:
    return FileRecord(num_bytes=path.stat().st_size, blake3=file_digest(path))
