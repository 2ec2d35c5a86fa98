"""The folder in which the command line keeps contexts and segments under names.

Owns the names: a context is `NAME.safetensors`, a snapshot; a segment is `NAME.segment.json`. What always holds: a
file appears whole or not at all and is never written again, only replaced, so forks can share it; of several who
want a new name one gets it; a name never leads out of the folder. A foreign or damaged file is refused by name with
the way out and hinders no other entry.
Knows files and headers, no engine.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import NonNegativeInt, ValidationError

from kvcomm.errors import (
    CacheFolderError,
    InvalidRequest,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotExists,
    SnapshotForeign,
    SnapshotTooNew,
)
from kvcomm.files.reading import TEXT_BYTES, open_regular, read_bytes
from kvcomm.files.records import StrictRecord
from kvcomm.files.writing import PART, NameTaken, publish, replacing, sweep
from kvcomm.memory.segments import Segment
from kvcomm.memory.snapshots import SUFFIX as CONTEXT_SUFFIX
from kvcomm.memory.snapshots import SnapshotHeader, read_header
from kvcomm.model.cache_folder import cache_root

SEGMENT_SUFFIX = ".segment.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StoredSegment(StrictRecord):
    """The content of a segment file, format version 1. `digest` is the segment's identity in `namespace`."""

    format: Literal["kvcomm-segment"] = "kvcomm-segment"
    format_version: Literal[1] = 1
    namespace: str
    model: str
    digest: str
    created: str
    text: str
    token_ids: tuple[NonNegativeInt, ...]


class ContextEntry(NamedTuple):
    """A context file; `header` is None if it is refused, and `refusal` says why, as in "FILE is ..."."""

    name: str
    file: Path
    num_bytes: int
    num_links: int
    header: SnapshotHeader | None
    refusal: str | None


class SegmentEntry(NamedTuple):
    """A segment file; `stored` is None if it is refused, and `refusal` says why, as in "FILE is ..."."""

    name: str
    file: Path
    stored: StoredSegment | None
    refusal: str | None


class Store:
    """The entries of one folder. Making a store touches nothing; the folder comes with the first thing to be kept."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` None is `contexts` in the user's cache folder."""
        self.folder = folder.expanduser() if folder is not None else cache_root() / "contexts"

    # -- contexts ---------------------------------------------------------------------------------------------

    def contexts(self) -> list[ContextEntry]:
        """Every context file by name, refused ones included. No folder: nothing."""
        return [context_entry(file) for file in self._files(CONTEXT_SUFFIX)]

    def context(self, name: str) -> ContextEntry:
        """One context, refused or not.

        Raises:
            InvalidRequest: a bad name, or there is none; the message lists those there are.
        """
        return context_entry(self._existing(name, CONTEXT_SUFFIX, "context"))

    def usable_context(self, name: str) -> ContextEntry:
        """One context whose header can be read.

        Raises:
            InvalidRequest: a bad name, or there is none.
            SnapshotError: it is refused; names the file and the way out.
        """
        file = self._existing(name, CONTEXT_SUFFIX, "context")
        with way_out(name):
            read_header(file)
        return context_entry(file)

    def require_writable(self) -> None:
        """Find out before a model is loaded and a prompt computed that the result could not be kept.

        Raises:
            CacheFolderError: the folder cannot be written, or made.
        """
        with folder_errors("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    def new_context(self, name: str, *, force: bool = False) -> Path:
        """The file for a context to be made; to be written under `taking`, as its name may be taken meanwhile.

        Raises:
            InvalidRequest: a bad name, or it is taken and not `force`.
            CacheFolderError: the folder cannot be written.
        """
        return self._new(name, CONTEXT_SUFFIX, "context", force)

    def fork_context(self, name: str, new: str, *, force: bool = False) -> int:
        """Let `new` be the same context as `name`. Returns the bytes copied: 0 where the disk knows hard links.

        Raises:
            InvalidRequest, SnapshotError: as `usable_context` and `new_context`.
            CacheFolderError: the folder cannot be written.
        """
        source = self.usable_context(name)
        target = self.new_context(new, force=force)
        with self.taking(new):
            return place(source.file, target, link=True, is_new=not force)

    def remove_context(self, name: str) -> int:
        """Remove a context, whatever state it is in. Returns the bytes freed: 0 while a fork shares the file.

        Raises:
            InvalidRequest: a bad name, or there is none.
            CacheFolderError: it cannot be removed.
        """
        return remove(self._existing(name, CONTEXT_SUFFIX, "context"))

    # -- segments ---------------------------------------------------------------------------------------------

    def segments(self) -> list[SegmentEntry]:
        """Every segment file by name, refused ones included. No folder: nothing."""
        return [_segment_entry(file) for file in self._files(SEGMENT_SUFFIX)]

    def segment(self, name: str) -> StoredSegment:
        """A segment that passes its checks.

        Raises:
            InvalidRequest: a bad name, or there is none.
            CacheFolderError: the file is foreign or damaged; names it and the way out.
        """
        entry = _segment_entry(self._existing(name, SEGMENT_SUFFIX, "segment"))
        if entry.stored is None:
            raise CacheFolderError(
                f"{entry.file} {entry.refusal}; remove it with `kvcomm segment rm {name}` and add it again"
            )
        return entry.stored

    def require_segment(self, name: str) -> None:
        """Raise InvalidRequest for a bad name, or if there is no such segment, whatever state it is in."""
        self._existing(name, SEGMENT_SUFFIX, "segment")

    def require_new_segment(self, name: str, *, force: bool = False) -> None:
        """Raise as `new_context` does."""
        self._new(name, SEGMENT_SUFFIX, "segment", force)

    def write_segment(self, name: str, stored: StoredSegment, *, force: bool = False) -> Path:
        """Write a segment.

        Raises:
            InvalidRequest: a bad name, or it is taken and not `force`.
            CacheFolderError: the folder cannot be written.
        """
        file = self._new(name, SEGMENT_SUFFIX, "segment", force)
        with self.taking(name, "segment"), folder_errors("write", file), replacing(file, is_new=not force) as temporary:
            temporary.write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return file

    def remove_segment(self, name: str) -> int:
        """Remove a segment, whatever state it is in; raises as `remove_context`. Returns the bytes freed."""
        return remove(self._existing(name, SEGMENT_SUFFIX, "segment"))

    @contextmanager
    def taking(self, name: str, kind: str = "context") -> Iterator[None]:
        """Raises InvalidRequest where what is written finds its name taken, although it was free before."""
        try:
            yield
        except (NameTaken, SnapshotExists) as error:
            raise self._taken(name, kind) from error

    def _taken(self, name: str, kind: str) -> InvalidRequest:
        return InvalidRequest(f"{kind} {name!r} exists in {self.folder}; choose another name or give --force")

    # -- names ------------------------------------------------------------------------------------------------

    def _files(self, suffix: str) -> list[Path]:
        with folder_errors("read", self.folder):
            if not self.folder.exists():
                return []
            files = [file for file in self.folder.iterdir() if file.name.endswith(suffix) and file.is_file()]
        shown = (file for file in files if not file.name.startswith("."))
        return sorted(shown, key=lambda file: file.name.removesuffix(suffix))

    def _file(self, name: str, suffix: str) -> Path:
        if not NAME.fullmatch(name) or name.endswith(suffix):
            raise InvalidRequest(
                f"bad name {name!r}; a name has up to 100 letters, digits, '.', '_' and '-', begins with a letter or "
                f"digit, and does not end in {suffix}"
            )
        return self.folder / f"{name}{suffix}"

    def _existing(self, name: str, suffix: str, kind: str) -> Path:
        file = self._file(name, suffix)
        if not file.is_file():
            names = ", ".join(found.name.removesuffix(suffix) for found in self._files(suffix)) or "none"
            raise InvalidRequest(f"no {kind} {name!r} in {self.folder}; there are: {names}")
        return file

    def _new(self, name: str, suffix: str, kind: str, force: bool) -> Path:
        file = self._file(name, suffix)
        if file.exists() and not force:
            raise self._taken(name, kind)
        self.require_writable()
        sweep(self.folder)
        return file


def context_entry(file: Path) -> ContextEntry:
    """What a snapshot file says of itself, or why it is refused."""
    header, refusal = None, None
    try:
        header = read_header(file)
    except SnapshotError as error:
        refusal = str(error).removeprefix(str(file)).lstrip(" :")
    status = file.stat() if file.exists() else None
    return ContextEntry(
        name=file.name.removesuffix(CONTEXT_SUFFIX),
        file=file,
        num_bytes=status.st_size if status else 0,
        num_links=status.st_nlink if status else 0,
        header=header,
        refusal=refusal,
    )


@contextmanager
def way_out(name: str) -> Iterator[None]:
    """Add to the refusal of a named context what its user can do about it."""
    removal = f"remove it with `kvcomm context rm {name}`"
    try:
        yield
    except SnapshotForeign as error:
        raise SnapshotForeign(f"{error}; give the model it was made with as --model, or {removal}") from error
    except SnapshotTooNew as error:
        raise SnapshotTooNew(f"{error}, or {removal}") from error
    except SnapshotCorrupt as error:
        raise SnapshotCorrupt(f"{error}; {removal}") from error


def place(source: Path, target: Path, *, link: bool, is_new: bool = False) -> int:
    """Put a file at another place, whole or not at all.

    Args:
        link: let both be one file where the disk can do that.
        is_new: do not replace a file that is there by then.

    Returns:
        The bytes copied; 0 if linked.

    Raises:
        NameTaken: `is_new`, and there is one.
        CacheFolderError: the target cannot be written.
    """
    with folder_errors("write", target):
        if link and _is_linked(source, target, is_new=is_new):
            return 0
        with replacing(target, is_new=is_new) as temporary, open_regular(source) as content:
            with temporary.open("wb") as copy:
                shutil.copyfileobj(content, copy)
            return temporary.stat().st_size


def remove(file: Path) -> int:
    """Remove a file or a foreign folder's name. Returns the bytes freed: 0 while another name shares the file.

    Raises:
        CacheFolderError: it cannot be removed.
    """
    with folder_errors("remove", file):
        status = file.stat()
        file.unlink()
    return status.st_size if status.st_nlink == 1 else 0


@contextmanager
def folder_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn file system errors into one CacheFolderError; `doing` completes "cannot ... PATH"."""
    try:
        yield
    except NameTaken:
        raise
    except OSError as error:
        raise CacheFolderError(
            f"cannot {doing} {path}: {error.strerror or error}; free or repair it, or choose another place (--dir)"
        ) from error


def _is_linked(source: Path, target: Path, *, is_new: bool) -> bool:
    """Make `target` another name of `source`, if the file system can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source):  # says what is wrong with it
        pass
    try:
        if is_new:
            os.link(source, target)
        else:
            _relink(source, target)
    except FileExistsError as error:
        raise NameTaken(error.errno, error.strerror, str(target)) from error
    except OSError:
        return False
    return True


def _relink(source: Path, target: Path) -> None:
    """A link replaces nothing: make it under a hidden name, and move it. Swept meanwhile, it is a copy's turn."""
    link = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PART}")
    try:
        os.link(source, link)
        publish(link, target)
    finally:
        link.unlink(missing_ok=True)  # moving a name to another one of the same file leaves both


def _segment_entry(file: Path) -> SegmentEntry:
    name = file.name.removesuffix(SEGMENT_SUFFIX)
    try:
        stored = StoredSegment.model_validate_json(read_bytes(file, max_bytes=TEXT_BYTES))
    except OSError as error:
        return SegmentEntry(name, file, None, f"cannot be read: {error.strerror or error}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        return SegmentEntry(name, file, None, f"is not a segment file of this version ({where}: {first['msg']})")
    try:
        digest = Segment(stored.token_ids).digest(stored.namespace)
    except OverflowError:
        digest = ""
    if digest != stored.digest:
        return SegmentEntry(name, file, None, "was altered: its tokens do not have its digest")
    return SegmentEntry(name, file, stored, None)
