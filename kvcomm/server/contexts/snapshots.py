"""Snapshots: contexts as files in the operator's folder, one folder in it per tenant.

A name is a name and no path: no separator, no leading dot. A file is used only if every byte of it is as it was
written, by this tenant and for this model; what it says of its conversation is checked too. Messages name the snapshot,
never where it lies. For worker threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest, SnapshotCorrupt, SnapshotError, SnapshotForeign, SnapshotTooNew
from kvcomm.memory.snapshots import SUFFIX, read_header
from kvcomm.server.contexts.conversation import Conversation
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.contexts import Snapshot

CODES = {
    SnapshotCorrupt: "snapshot_corrupt",
    SnapshotForeign: "snapshot_foreign",
    SnapshotTooNew: "snapshot_too_new",
}


def make_folder(folder: Path) -> None:
    """Raises InvalidRequest when there is no such folder and none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"snapshots cannot be kept in {folder}: {error.strerror or error}") from error


class SnapshotFolder:
    """The snapshots of one tenant."""

    def __init__(self, root: Path, tenant: str, *, max_snapshots: int) -> None:
        self._folder = root / tenant
        self._max_snapshots = max_snapshots

    def save(self, context: Context, name: str, *, replace: bool) -> Snapshot:
        """Write a context, whole or not at all.

        Raises:
            ApiError: 409 for a name that is taken, 429 for one snapshot too many, 503 when it cannot be written.
        """
        file = self._file(name)
        if not file.exists():
            self._require_place()
        elif not replace:
            message = f"there is a snapshot {name!r} already; choose another name, or say replace"
            raise ApiError(409, "snapshot_exists", message, param="name")
        with _told(name, file):
            context.save(file)
            return _described(file)

    def snapshots(self) -> list[Snapshot]:
        """All of them by name, damaged ones too."""
        return [_described(file) for file in self._files()]

    def num_tokens(self, name: str) -> int:
        """Tokens that a snapshot says it has.

        Raises:
            ApiError: 404 for an unknown one, 409 for a damaged one.
        """
        file = self._existing(name)
        with _told(name, file):
            return len(read_header(file).token_ids)

    def restore(
        self, engine: Engine, name: str, *, space: str, adapter: str | None = None
    ) -> tuple[Context, Conversation | None]:
        """A context from a snapshot, and its conversation.

        Raises:
            ApiError: 404 for an unknown one; 409 for a damaged one, or one of another model, tenant or salt.
            PoolExhausted: there is no room for it.
        """
        file = self._existing(name)
        with _told(name, file):
            context = engine.restore(file, adapter=adapter, tenant=space)
            try:
                return context, Conversation.from_note(context.note)
            except SnapshotCorrupt:
                context.release()
                raise

    def remove(self, name: str) -> None:
        """Delete a snapshot, in whatever state it is.

        Raises:
            ApiError: 404 for an unknown one.
        """
        self._existing(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"[!.]*{SUFFIX}"))

    def _existing(self, name: str) -> Path:
        file = self._file(name)
        if not file.is_file():
            raise ApiError(404, "snapshot_not_found", f"there is no snapshot {name!r}", param="name")
        return file

    def _require_place(self) -> None:
        num_files = len(self._files())
        if num_files >= self._max_snapshots:
            message = f"this tenant has {num_files} of at most {self._max_snapshots} snapshots; delete some"
            raise ApiError(429, "quota_exceeded", message, retry_after_s=1)


def _described(file: Path) -> Snapshot:
    name, num_bytes = file.name.removesuffix(SUFFIX), file.stat().st_size
    try:
        header = read_header(file)
    except SnapshotError as error:
        return Snapshot(name=name, bytes=num_bytes, refusal=_message(name, file, error))
    return Snapshot(
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
def _told(name: str, file: Path) -> Iterator[None]:
    """Errors about a file in the client's terms."""
    try:
        yield
    except SnapshotError as error:
        message = _message(name, file, error)
        code = CODES.get(type(error))
        if code is None:
            raise ApiError(503, "snapshot_failed", message, retry_after_s=1) from error
        raise ApiError(409, code, message, param="name") from error
