"""A folder of anchors as one file, a plain tar archive: to hand it on, over a network too.

Archives may come from anywhere. Nothing in one is trusted: members are ordinary files under their own names, every
bank is checked, and what is refused leaves nothing behind.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

from kvcomm.align.bank_file import SUFFIX, verify_bank
from kvcomm.align.profile_file import EARLIER_FILE, READERS_FILE, bank_files, looking, read_readers, too_old
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, InvalidRequest
from kvcomm.files.reading import open_regular
from kvcomm.files.writing import NameTaken, replacing


def export_archive(folder: str | Path, file: str | Path, *, is_new: bool = False) -> int:
    """Pack a folder of anchors into an archive; returns the number of banks.

    Args:
        is_new: do not replace a file that is there by the time the archive is written.

    Raises:
        InvalidRequest: `is_new`, and there is one.
        AnchorFileError: a file is refused, or the archive cannot be written.
    """
    folder, file = Path(folder), Path(file)
    with looking(folder):
        banks = bank_files(folder)
        for bank in banks:
            verify_bank(bank)
        read_readers(folder)
        names = [*(bank.name for bank in banks), READERS_FILE]  # last: whoever has it has everything
        try:
            with (
                replacing(file, is_new=is_new) as partial,
                tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive,
            ):
                for name in names:
                    _pack(archive, folder / name)
        except NameTaken as error:
            raise InvalidRequest(f"{file} exists; choose another file or give --force") from error
        except OSError as error:
            raise AnchorFileError(f"{file} cannot be written: {error.strerror or error}") from error
    return len(banks)


def import_archive(file: str | Path, folder: str | Path) -> int:
    """Unpack an archive into a folder that does not exist yet; returns the number of banks.

    Raises:
        AnchorFileError: it cannot be read, holds anything else than anchors, or anchors that are refused; then there
            is no folder.
    """
    file, folder = Path(file), Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            unpacked = Path(name) / "anchors"
            unpacked.mkdir()
            with open_regular(file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    _unpack(file, archive, member, unpacked)
            banks = _verified(file, unpacked)
            unpacked.rename(folder)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise AnchorFileCorrupt(f"{file} is not a whole archive of anchors: {error}") from error
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be imported: {error.strerror or error}") from error
    return len(banks)


def _verified(file: Path, unpacked: Path) -> list[Path]:
    """The banks that came out of an archive, all of them whole."""
    if not (unpacked / READERS_FILE).exists():
        raise AnchorFileCorrupt(f"{file} is not a whole archive of anchors: {READERS_FILE} is missing")
    try:
        banks = bank_files(unpacked)
        for bank in banks:
            verify_bank(bank)
        read_readers(unpacked)
    except AnchorFileError as error:  # says where it was unpacked, which is no place that anybody knows
        raise type(error)(f"{file} holds {str(error).replace(f'{unpacked}/', '')}") from error
    return banks


def _unpack(file: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One member, under its own name and as an ordinary file: no paths, links or devices."""
    if member.name == EARLIER_FILE:
        raise too_old(file / member.name)
    is_anchor = member.name == READERS_FILE or member.name.endswith(SUFFIX)
    is_plain = member.isreg() and not member.issparse()
    if not is_plain or not is_anchor or Path(member.name).name != member.name or member.name.startswith("."):
        raise AnchorFileCorrupt(f"{file} holds {member.name!r}, which is no file of anchors; nothing was imported")
    content = archive.extractfile(member)
    assert content is not None  # an ordinary file
    with (folder / member.name).open("xb") as out:
        shutil.copyfileobj(content, out)


def _pack(archive: tarfile.TarFile, file: Path) -> None:
    """Add a file under its own name, as it is now and as an ordinary one."""
    with open_regular(file) as stream:
        member = _anonymous(archive.gettarinfo(arcname=file.name, fileobj=stream))
        archive.addfile(member, stream)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing about who packed it, on which machine."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
