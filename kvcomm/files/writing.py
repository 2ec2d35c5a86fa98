"""Writing files that others may be reading or writing, in this process and in others.

A file appears whole or not at all: it is written in a hidden folder beside its place and put there in one step. Whoever
wants a new name gets it or is told that it is taken; of several at once one gets it. Beside each hidden folder lies a
mark, `.NAME.*.part`, on which its writer holds a lock as long as it lives; what killed processes left has none, and is
swept. What has to be looked at and changed in one, such as how many files a folder holds, is done under the folder's
lock.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
HIDDEN = re.compile(r"\.(?P<name>.+)\.[A-Za-z0-9_]+" + re.escape(PART), re.DOTALL)
LOCK_FILE = ".lock"


class NameTaken(FileExistsError):
    """There is a file of that name, and it was not to be replaced."""


@contextmanager
def replacing(file: Path, *, is_new: bool = False, is_lasting: bool = True) -> Iterator[Path]:
    """A hidden file, empty and private, to be written in the block and put in `file`'s place at its end.

    Where the block fails, nothing has changed. The folder is made if there is none.

    Args:
        is_new: do not replace a file that is there by then.
        is_lasting: it outlives a machine that fails right afterwards, which costs the time that the disk takes.

    Raises:
        NameTaken: `is_new`, and there is one.
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with reserved(file) as mark:
        folder = _folder_of(mark)  # a folder: some libraries write beside the file that they are given
        folder.mkdir(mode=0o700)
        try:
            hidden = folder / file.name
            hidden.touch(mode=0o600)
            yield hidden
            if is_lasting:
                _sync(hidden)
            publish(hidden, file, is_new=is_new)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reserved(file: Path) -> Iterator[Path]:
    """A mark beside `file` that says who makes it; it is gone at the end of the block.

    Raises:
        OSError: there is no such folder, or it cannot be written.
    """
    descriptor, mark = _marked(file)
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)
        os.close(descriptor)


def unfinished(folder: Path) -> set[str]:
    """The names of files that are being made in a folder; after a `sweep`, by living writers.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return {match["name"] for entry in entries if (match := HIDDEN.fullmatch(entry.name))}


def publish(hidden: Path, file: Path, *, is_new: bool = False) -> None:
    """Give a whole file its name, in one step; it may keep its former name besides.

    Where a disk knows no hard links a new name is claimed with an empty file first, which is then replaced: there, and
    only there, others may see the empty file for a moment, or for good if this process is killed in between.

    Raises:
        NameTaken: `is_new`, and there is a file of that name.
        OSError: it cannot be done.
    """
    if not is_new:
        hidden.replace(file)
        return
    try:
        os.link(hidden, file)
    except FileExistsError as error:
        raise NameTaken(error.errno, error.strerror, str(file)) from error
    except OSError:
        _claim(file)
        try:
            hidden.replace(file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise


def sweep(folder: Path, name: str = "") -> int:
    """Remove what killed writers left in a folder; returns how many files they were writing.

    What living writers write stays, and so does what cannot be removed.

    Args:
        name: of the file that they were to become; empty: of any.
    """
    num_removed = 0
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if _is_hidden(entry, name)]
    except OSError:
        return 0
    for entry in found:
        try:
            descriptor = os.open(entry.path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(_folder_of(Path(entry.path)), ignore_errors=True)
            os.unlink(entry.path)
            num_removed += 1
        except OSError:  # its writer lives, or it is gone
            continue
        finally:
            os.close(descriptor)
    return num_removed


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep everybody else who asks for it out of a folder: other threads and other processes.

    Args:
        shared: keep out only those who want it for themselves; where that cannot be had, such as on a disk that may
            only be read, go on without.

    Raises:
        OSError: there is no such folder, or it cannot be locked.
    """
    folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    descriptor: int | None = folder_descriptor
    try:
        fcntl.flock(folder_descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError:  # network disks lock only what is open for writing, which no folder is
        os.close(folder_descriptor)
        descriptor = _locked_file(folder / LOCK_FILE, shared=shared)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked_file(file: Path, *, shared: bool) -> int | None:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        if shared:
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        if shared:
            return None
        raise
    return descriptor


def _marked(file: Path) -> tuple[int, Path]:
    """A new mark, and a descriptor whose lock says that its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=PART)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody sweeps it at this moment
            os.close(descriptor)
            continue
        except OSError:  # no locks here: nobody can sweep either
            return descriptor, Path(name)
        if os.fstat(descriptor).st_nlink:  # else it was swept before the lock was on it
            return descriptor, Path(name)
        os.close(descriptor)


def _folder_of(mark: Path) -> Path:
    return mark.with_suffix(".d")


def _claim(file: Path) -> None:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise NameTaken(error.errno, error.strerror, str(file)) from error


def _is_hidden(entry: os.DirEntry[str], name: str) -> bool:
    match = HIDDEN.fullmatch(entry.name)
    return match is not None and name in ("", match["name"]) and entry.is_file(follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
