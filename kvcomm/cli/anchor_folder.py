"""A folder of anchors as the command line sees it: entries that are usable, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kvcomm.align.bank_file import SUFFIX, BankHeader, read_bank_header
from kvcomm.align.profile_file import GROUPS_FILE, GroupRecord, bank_files, read_groups, save_groups
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
        return read_groups(self.folder).groups if (self.folder / GROUPS_FILE).exists() else ()

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
        kept = [group for group in self.groups if gone.isdisjoint({each.bank for each in group.edges})]
        if dry_run:
            return len(self.groups) - len(kept)
        if len(kept) < len(self.groups):  # first: a group without its bank would be left out anyway
            save_groups(self.folder, read_groups(self.folder).namespace, kept)
        for entry in chosen:
            try:
                entry.file.unlink(missing_ok=True)
            except OSError as error:
                raise AnchorFileError(f"{entry.file} cannot be removed: {error.strerror or error}") from error
        return len(self.groups) - len(kept)


def _entry(file: Path) -> BankEntry:
    num_bytes = file.stat().st_size
    try:
        return BankEntry(file, num_bytes, read_bank_header(file), None)
    except AnchorFileError as error:
        return BankEntry(file, num_bytes, None, str(error))


def _saved(entry: BankEntry) -> datetime:
    return datetime.fromtimestamp(entry.file.stat().st_mtime, UTC)
