"""A folder of anchors as the command line sees it: entries that are usable, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kvcomm.align.bank_file import SUFFIX, BankHeader, read_bank_header
from kvcomm.align.profile_file import GROUPS_FILE, GroupRecord, bank_files, changing, read_groups, save_groups
from kvcomm.errors import AnchorFileError, InvalidRequest

NUM_DIGITS = 12
"""Of an edge, shown."""


class BankEntry(NamedTuple):
    """One bank's file: its header, or why it is refused."""

    file: Path
    num_bytes: int
    header: BankHeader | None
    refusal: str | None

    @property
    def edge(self) -> str:
        """The first digits of the edge; of a refused file, of its name."""
        return (self.header.edge.digest if self.header else self.file.name.removesuffix(SUFFIX))[:NUM_DIGITS]

    def require(self) -> BankHeader:
        """The header. Raises AnchorFileError for a refused file."""
        if self.header is None:
            raise AnchorFileError(self.refusal or f"{self.file} cannot be used")
        return self.header


class AnchorFolder:
    """What lies in one folder."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidRequest if there is no such folder."""
        if not folder.is_dir():
            raise InvalidRequest(f"{folder} is not a folder of anchors; `Engine.save_anchors` writes one")
        self.folder = folder

    @cached_property
    def entries(self) -> list[BankEntry]:
        """Every bank, by name."""
        return [_entry(file) for file in bank_files(self.folder)]

    @cached_property
    def groups(self) -> tuple[GroupRecord, ...]:
        """Every edge group; none where their file is missing. Raises AnchorFileError for a damaged one."""
        return self._groups_now()[1]

    def groups_of(self, entry: BankEntry) -> list[GroupRecord]:
        """The groups that rest on a bank."""
        digest = None if entry.header is None else entry.header.payload_blake3
        return [group for group in self.groups if digest in {each.bank for each in group.edges}]

    def entry(self, prefix: str) -> BankEntry:
        """The one bank whose edge begins so.

        Raises:
            InvalidRequest: none, or several.
        """
        found = [entry for entry in self.entries if entry.edge.startswith(prefix[:NUM_DIGITS])]
        if len(found) != 1:
            which = "no bank" if not found else f"{len(found)} banks"
            raise InvalidRequest(f"{which} in {self.folder} for edge {prefix!r}; `kvcomm anchors ls` shows them")
        return found[0]

    def choose(self, edges: Iterable[str], older_than_days: float | None, keep_bytes: int | None) -> list[BankEntry]:
        """Those to remove: the ones named, those saved longer ago, and the oldest beyond `keep_bytes`."""
        chosen = {entry.file: entry for entry in map(self.entry, edges)}
        oldest_first = sorted(self.entries, key=_saved)
        if older_than_days is not None:
            limit = datetime.now(UTC) - timedelta(days=older_than_days)
            chosen |= {entry.file: entry for entry in oldest_first if _saved(entry) < limit}
        if keep_bytes is not None:
            left = sum(entry.num_bytes for entry in self.entries if entry.file not in chosen)
            for entry in oldest_first:
                if left > keep_bytes and entry.file not in chosen:
                    chosen[entry.file] = entry
                    left -= entry.num_bytes
        return list(chosen.values())

    def prune(self, chosen: Sequence[BankEntry], *, dry_run: bool) -> int:
        """Remove banks and the groups that rest on them; returns how many groups.

        Raises:
            AnchorFileError: the folder cannot be written.
        """
        gone = {entry.header.payload_blake3 for entry in chosen if entry.header}
        if dry_run:
            return sum(_rests_on(group, gone) for group in self.groups)
        with changing(self.folder):
            namespace, groups = self._groups_now()  # others may have saved since they were shown
            kept = [group for group in groups if not _rests_on(group, gone)]
            if len(kept) < len(groups):  # first: a group without its bank would be left out anyway
                save_groups(self.folder, namespace, kept)
            for entry in chosen:
                _remove(entry)
        return len(groups) - len(kept)

    def _groups_now(self) -> tuple[str, tuple[GroupRecord, ...]]:
        """Namespace and groups; none where their file is missing."""
        if not (self.folder / GROUPS_FILE).exists():
            return "", ()
        header = read_groups(self.folder)
        return header.namespace, header.groups


def _rests_on(group: GroupRecord, banks: set[str]) -> bool:
    return not banks.isdisjoint({each.bank for each in group.edges})


def _remove(entry: BankEntry) -> None:
    """A bank that was replaced since it was chosen stays."""
    try:
        if entry.header is None or read_bank_header(entry.file) == entry.header:
            entry.file.unlink(missing_ok=True)
    except AnchorFileError:  # gone, or damaged meanwhile
        pass
    except OSError as error:
        raise AnchorFileError(f"{entry.file} cannot be removed: {error.strerror or error}") from error


def _entry(file: Path) -> BankEntry:
    try:
        num_bytes = file.stat().st_size
    except OSError:  # gone by now; reading says so
        num_bytes = 0
    try:
        return BankEntry(file, num_bytes, read_bank_header(file), None)
    except AnchorFileError as error:
        return BankEntry(file, num_bytes, None, str(error))


def _saved(entry: BankEntry) -> datetime:
    return datetime.fromtimestamp(entry.file.stat().st_mtime, UTC)
