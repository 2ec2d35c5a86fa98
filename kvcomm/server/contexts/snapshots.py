"""Snapshots: contexts as files in the operator's folder, one folder in it per tenant.

A name is a name and no path: no separator, no leading dot. A file is used only if every byte of it is as it was
written, by this tenant and for this model; what it says of its conversation is checked too. Of several who save under
one new name one does, and no more files come to be than a tenant may have, however many servers share the folder.
Messages name the snapshot, never where it lies; the operator's log says that too. For worker threads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.errors import (
    InvalidRequest,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotExists,
    SnapshotForeign,
    SnapshotTooNew,
)
from kvcomm.files.writing import locked, reserved, sweep, unfinished
from kvcomm.memory.snapshots import SUFFIX, read_header
from kvcomm.server.contexts.conversation import KeptConversation
from kvcomm.server.errors import ApiError, failed_file
from kvcomm.server.schemas.contexts import SnapshotObject

logger = logging.getLogger("kvcomm.server")

CODES = {
    SnapshotCorrupt: "snapshot_corrupt",
    SnapshotForeign: "snapshot_foreign",
    SnapshotTooNew: "snapshot_too_new",
}


def open_folder(folder: Path) -> None:
    """Make the folder if there is none, and remove what killed servers left of files that they were writing.

    Raises:
        InvalidRequest: there is no such folder and none can be made, or it cannot be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(folder) as entries:
            tenants = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise InvalidRequest(f"snapshots cannot be kept in {folder}: {error.strerror or error}") from error
    num_swept = sum(sweep(tenant) for tenant in tenants)
    if num_swept:
        logger.warning("removed %d unfinished files of killed servers from %s", num_swept, folder)


class SnapshotFolder:
    """The snapshots of one tenant."""

    def __init__(self, root: Path, tenant: str, *, max_snapshots: int) -> None:
        self._folder = root / tenant
        self._max_snapshots = max_snapshots

    def save(self, context: Context, name: str, *, replace: bool) -> SnapshotObject:
        """Write a context, whole or not at all.

        Raises:
            ApiError: 409 for a name that is taken, 429 for one snapshot too many, 503 when it cannot be written.
        """
        file = self.file(name)
        with _told(name, file, may_be_missing=False), self._place(file, replace=replace):
            context.save(file, replace=replace)
            return _described(file)

    def snapshots(self) -> list[SnapshotObject]:
        """All of them by name, damaged ones too.

        Raises:
            ApiError: 503 when the folder cannot be read.
        """
        found = []
        try:
            for file in map(self.file, self._names()):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    found.append(_described(file))
        except OSError as error:
            raise failed_file("snapshot_failed", "the folder of snapshots", error) from error
        return found

    def num_tokens(self, name: str) -> int:
        """Tokens that a snapshot says it has.

        Raises:
            ApiError: 404 for an unknown one, 409 for a damaged one, 503 when it cannot be read.
        """
        file = self.file(name)
        with _told(name, file):
            return len(read_header(file).token_ids)

    def restore(
        self, engine: Engine, name: str, *, space: str, adapter: str | None = None
    ) -> tuple[Context, KeptConversation | None]:
        """A context from a snapshot, and its conversation.

        Raises:
            ApiError: 404 for an unknown one; 409 for a damaged one, or one of another model, tenant or salt; 503 when
                it cannot be read.
            PoolExhausted: there is no room for it.
        """
        file = self.file(name)
        with _told(name, file):
            context = engine.restore(file, adapter=adapter, tenant=space)
            try:
                return context, KeptConversation.from_note(context.note)
            except SnapshotCorrupt:
                context.release()
                raise

    def remove(self, name: str) -> None:
        """Delete a snapshot, in whatever state it is.

        Raises:
            ApiError: 404 for an unknown one, 503 when it cannot be deleted.
        """
        file = self.file(name)
        with _told(name, file):
            file.unlink()

    def file(self, name: str) -> Path:
        """Where a snapshot lies, or would."""
        return self._folder / f"{name}{SUFFIX}"

    def _names(self) -> list[str]:
        """Sorted. Raises OSError when the folder cannot be read; none where there is no folder."""
        try:
            with os.scandir(self._folder) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX) and name[0] != ".")

    @contextmanager
    def _place(self, file: Path, *, replace: bool) -> Iterator[None]:
        """Keep a place for a file while it is written; those that others are writing count too.

        Raises:
            ApiError: 409 for a name that is taken, 429 when all places are.
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with locked(self._folder):
                sweep(self._folder)  # what is unfinished now has a living writer
                # In this order: what is finished in between, which needs no lock, is seen twice rather than never.
                coming = {self._folder / name for name in unfinished(self._folder)}
                files = {self.file(name) for name in self._names()}
                if file in files and not replace:
                    raise taken(_name_of(file))
                num_files = len(files | coming)
                if file not in files | coming and num_files >= self._max_snapshots:
                    message = f"this tenant has {num_files} of at most {self._max_snapshots} snapshots; delete some"
                    raise ApiError(429, "quota_exceeded", message, retry_after_s=1)
                stack.enter_context(reserved(file))
            yield


def _name_of(file: Path) -> str:
    return file.name.removesuffix(SUFFIX)


def taken(name: str) -> ApiError:
    """The answer where there is a snapshot of that name, which is not to be replaced."""
    message = f"there is a snapshot {name!r} already; choose another name, or say replace"
    return ApiError(409, "snapshot_exists", message, param="name")


def _described(file: Path) -> SnapshotObject:
    name, num_bytes = _name_of(file), file.stat().st_size
    try:
        header = read_header(file)
    except SnapshotError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        return SnapshotObject(name=name, bytes=num_bytes, refusal=_message(name, file, error))
    return SnapshotObject(
        name=name,
        bytes=num_bytes,
        tokens=len(header.token_ids),
        fidelity=header.fidelity.value,
        created=header.created,
    )


def _message(name: str, file: Path, error: SnapshotError) -> str:
    if isinstance(error, SnapshotForeign):  # whose it is, is nobody's business
        return f"snapshot {name!r} was made with another model, tenant or cache_salt"
    return str(error).replace(str(file), f"snapshot {name!r}")


@contextmanager
def _told(name: str, file: Path, *, may_be_missing: bool = True) -> Iterator[None]:
    """Errors about a file in the client's terms."""
    try:
        yield
    except SnapshotExists as error:
        raise taken(_name_of(file)) from error
    except (SnapshotError, OSError) as error:
        cause = error.__cause__ if isinstance(error, SnapshotError) else error
        if isinstance(error, SnapshotError) and (code := CODES.get(type(error))):
            raise ApiError(409, code, _message(name, file, error), param="name") from error
        if may_be_missing and isinstance(cause, FileNotFoundError):
            raise ApiError(404, "snapshot_not_found", f"there is no snapshot {name!r}", param="name") from error
        raise failed_file("snapshot_failed", f"snapshot {name!r}", error) from error
