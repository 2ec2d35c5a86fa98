"""A store in a folder, on a disk of this machine or one that several machines share.

Objects are read by mapping their files, privately and without a copy, on disks of this machine; from network disks,
where a mapped file that somebody removes ends the process that reads it, they are read into memory. They appear in one
step and are never changed in place. A file may be read by whom the folder lets in: its mode is the folder's without the
right to write. A folder that may only be read serves reads.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcomm.errors import ObjectMissing, StoreFailed, TierError
from kvcomm.files.reading import open_regular
from kvcomm.files.writing import NameTaken, replacing, sweep
from kvcomm.tiers.store import StoredObject, is_safe, safe_key, safe_prefix

MOUNTS = Path("/proc/self/mounts")
LOCAL_DISKS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "bcachefs"}
)
"""Kinds of file systems whose mapped files stay readable after they are removed."""

LEFTOVER = re.compile(r"[0-9a-f-]{16,}#[0-9]+")
"""What a killed writer leaves who puts objects into the folder through obstore."""
LEFTOVER_S = 3600.0
"""Seconds since it was written after which nobody writes it any more."""

USED_AGAIN_S = 60.0
"""An object's time of use is written no more often than this."""


class FolderStore:
    """Objects as files below a folder; see `ObjectStore` for what each method promises."""

    kind = "folder"

    def __init__(self, root: Path, *, is_mapped: bool) -> None:
        """Make one.

        Args:
            root: a folder that is there.
            is_mapped: files are mapped, else read into memory.
        """
        self.root = root
        self.url = str(root)
        self.is_mapped = is_mapped

    @classmethod
    def open(cls, root: Path, *, is_made: bool = True) -> FolderStore:
        """The store in a folder.

        Args:
            is_made: it is made, for its owner alone, if its parent is there.

        Raises:
            TierError: it is no folder, or cannot be made or read.
        """
        try:
            root = root.resolve()
            if is_made and not root.parent.is_dir():
                raise TierError(f"the folder {root} cannot be made: there is no {root.parent}; is it misspelt?")
            if is_made:
                root.mkdir(mode=0o700, exist_ok=True)
            with os.scandir(root):
                pass
        except (FileExistsError, NotADirectoryError) as error:
            raise TierError(f"{root} is no folder") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: of links in a circle
            reason = getattr(error, "strerror", None) or error
            raise TierError(f"the folder {root} cannot be used as a tier: {reason}") from error
        return cls(root, is_mapped=_is_local(root))

    def get(self, key: str) -> memoryview:
        """See `ObjectStore`; the bytes may be changed without anybody seeing it."""
        file = self._file(key)
        with self._reading(file), open_regular(file) as stream:
            status = os.fstat(stream.fileno())
            content = self._content(stream.fileno(), status.st_size)
        self._touch(file, status)
        return content

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `ObjectStore`."""
        file = self._file(key)
        with self._reading(file), open_regular(file) as stream:
            return memoryview(bytearray(os.pread(stream.fileno(), length, start)))

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        """See `ObjectStore`. A machine that fails right afterwards may lose it, which its digest then shows."""
        file = self._file(key)
        if file.exists():
            return False
        try:
            mode = self.root.stat().st_mode & 0o777
            self._make_folders(file.parent, mode)
            with replacing(file, is_new=True, is_lasting=False) as hidden, hidden.open("wb") as stream:
                stream.writelines(parts)
                os.fchmod(stream.fileno(), (mode & 0o444) | 0o400)
        except NameTaken:
            return False
        except OSError as error:
            raise StoreFailed(f"{file} cannot be written: {error.strerror or error}") from error
        return True

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore`."""
        start = self.root / safe_prefix(prefix)
        return self._walk(start)

    def delete(self, key: str) -> None:
        """See `ObjectStore`."""
        file = self._file(key)
        try:
            file.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreFailed(f"{file} cannot be removed: {error.strerror or error}") from error

    def sweep(self) -> int:
        """See `ObjectStore`; needs a disk that knows locks, which tell living writers from killed ones."""
        folders = [self.root]
        num_swept = 0
        while folders:
            folder = folders.pop()
            num_swept += sweep(folder)
            with suppress(OSError), os.scandir(folder) as entries:
                found = [each for each in entries if _is_shown(each)]
                folders += [Path(each) for each in found if each.is_dir(follow_symlinks=False)]
                num_swept += sum(map(_is_removed_leftover, found))
        return num_swept

    def close(self) -> None:
        """Nothing is open."""

    def _file(self, key: str) -> Path:
        return self.root / safe_key(key)

    def _content(self, descriptor: int, num_bytes: int) -> memoryview:
        if num_bytes and self.is_mapped:
            return memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY))
        content = memoryview(bytearray(num_bytes))
        num_read = 0
        while num_read < num_bytes:
            got = os.preadv(descriptor, [content[num_read:]], num_read)
            if got == 0:
                break
            num_read += got
        return content[:num_read]

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectMissing(f"there is no {file}") from error
        except (OSError, ValueError) as error:  # ValueError: of a file that was cut short while it was mapped
            raise StoreFailed(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def _touch(self, file: Path, status: os.stat_result) -> None:
        """Note that an object is used, in the time of access; the disk itself may not keep it."""
        now_ns = time.time_ns()
        if now_ns - status.st_atime_ns < USED_AGAIN_S * 1e9:
            return
        with suppress(OSError):  # a folder that may only be read, or a file that is gone
            os.utime(file, ns=(now_ns, status.st_mtime_ns))

    def _make_folders(self, folder: Path, mode: int) -> None:
        """Folders of the root's mode, so that all who may write there may write into them."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            with suppress(FileExistsError):
                each.mkdir()
                each.chmod(mode)

    def _walk(self, start: Path) -> Iterator[StoredObject]:
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    found = [each for each in entries if _is_shown(each)]
            except (FileNotFoundError, NotADirectoryError):  # nothing there, or not any more
                continue
            except OSError as error:
                raise StoreFailed(f"{folder} cannot be listed: {error.strerror or error}") from error
            folders += [Path(each) for each in found if each.is_dir(follow_symlinks=False)]
            yield from filter(None, map(self._stored, found))

    def _stored(self, entry: os.DirEntry[str]) -> StoredObject | None:
        try:
            if not entry.is_file(follow_symlinks=False):
                return None
            status = entry.stat(follow_symlinks=False)
        except OSError:  # removed meanwhile
            return None
        used_s = max(status.st_atime, status.st_mtime)
        key = Path(entry.path).relative_to(self.root).as_posix()
        return StoredObject(key, status.st_size, status.st_mtime, used_s) if is_safe(key) else None


def _is_removed_leftover(entry: os.DirEntry[str]) -> bool:
    """Remove a file that a killed writer of obstore's left, once no living one can be at it any more."""
    with suppress(OSError):
        if LEFTOVER.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_S:
            os.unlink(entry.path)
            return True
    return False


def _is_shown(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _is_local(folder: Path) -> bool:
    """Whether the disk of a folder is one of `LOCAL_DISKS`; a disk whose kind cannot be told is not."""
    try:
        lines = MOUNTS.read_text().splitlines()
        device = folder.stat().st_dev
    except OSError:
        return False
    kinds = {}
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        kinds[mount.encode().decode("unicode_escape")] = kind
    place = next((each for each in (folder, *folder.parents) if str(each) in kinds), None)
    return place is not None and place.stat().st_dev == device and kinds[str(place)] in LOCAL_DISKS
