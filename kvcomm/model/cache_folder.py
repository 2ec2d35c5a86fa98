"""The user's cache folder: where it is, how writing to it fails, and the lock that processes share.

Owns no content. Every `OSError` met while working in the folder leaves as one `CacheFolderError` that names
the folder, the reason and the way out.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from kvcomm.errors import CacheFolderError

CACHE_VARIABLE = "KVCOMM_CACHE"


def cache_root() -> Path:
    """`$KVCOMM_CACHE`, or the platform's cache folder for kvcomm. Not necessarily there yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("kvcomm"))


def models_root() -> Path:
    """The folder that holds one folder per converted model."""
    return cache_root() / "models"


@contextmanager
def cache_errors(folder: Path, doing: str) -> Iterator[None]:
    """Turn file system errors into one line about the cache folder.

    Args:
        folder: what was being worked on.
        doing: a verb phrase that completes "cannot ... FOLDER".

    Raises:
        CacheFolderError: instead of any OSError, or of safetensors' own error for a failed write.
    """
    try:
        yield
    except SafetensorError as error:
        code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else None
        raise CacheFolderError(f"cannot {doing} {folder}: {error}; {_way_out(code)}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheFolderError(f"cannot {doing} {folder}: {reason}; {_way_out(error.errno)}") from error


def _way_out(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space or set {CACHE_VARIABLE} to a folder on another disk"
    return f"set {CACHE_VARIABLE} to a folder that you can write"


@contextmanager
def locked(name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of one model among all processes; waits for as long as another process holds it.

    Args:
        name: of the model.
        on_wait: called once if there is something to wait for.

    Raises:
        CacheFolderError: the lock file cannot be created.
    """
    root = models_root()
    with cache_errors(root, "write to the cache folder"):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check the free space of the disk that holds `folder`.

    Raises:
        CacheFolderError: less than `needed_bytes` are free; both numbers are in the message.
    """
    with cache_errors(folder, "read the free space of"):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CacheFolderError(
            f"not enough disk space in {folder}: {needed_bytes:,} bytes needed, {free_bytes:,} free;"
            f" {_way_out(errno.ENOSPC)}"
        )
