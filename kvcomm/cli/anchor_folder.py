"""A folder of anchors as the command line sees it: banks and readers that are usable, and those refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from kvcomm.align.bank_file import SUFFIX, BankHeader, read_bank_header
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Pair
from kvcomm.align.ladder import DEFAULT_RUNGS, Ladder, ladders_of
from kvcomm.align.levels import Count, Knowledge, ReaderBook
from kvcomm.align.profile_file import (
    EARLIER_FILE,
    READERS_FILE,
    ReadersHeader,
    bank_files,
    changing,
    header_of,
    read_readers,
    save_readers,
    too_old,
)
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level
from kvcomm.errors import AnchorFileError, InvalidRequest

EntryT = TypeVar("EntryT")

NUM_DIGITS = 12
"""Of an edge or a reader, shown."""


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


class ReaderEntry(NamedTuple):
    """One reader and its own pairs."""

    reader: Reader
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """The first digits."""
        return self.reader.digest[:NUM_DIGITS]


class Pruned(NamedTuple):
    """What went, or would go: banks, readers, and pairs of readers that stay but were measured with other banks too."""

    num_banks: int
    num_readers: int
    num_cut: int


class AnchorFolder:
    """What lies in one folder."""

    def __init__(self, folder: Path) -> None:
        """Make one.

        Args:
            folder: one that is there.
        """
        self.folder = folder

    @cached_property
    def entries(self) -> list[BankEntry]:
        """Every bank, by name."""
        return [_entry(file) for file in bank_files(self.folder)]

    @cached_property
    def knowledge(self) -> Knowledge:
        """What is known of readers; nothing where their file is missing. Raises AnchorFileError for a damaged one."""
        header = self._header_now()
        return Knowledge() if header is None else header.knowledge()

    @cached_property
    def refusal(self) -> str | None:
        """Why readers cannot be looked at; None: they can."""
        try:
            _ = self.knowledge
        except AnchorFileError as error:
            return str(error)
        return None

    @property
    def readers(self) -> list[ReaderEntry]:
        """Every reader, the one used last at the end. Raises AnchorFileError for a damaged file."""
        return [ReaderEntry(reader, pairs) for reader, pairs in self.knowledge.readers]

    @property
    def leftover(self) -> str | None:
        """What to say about a file of an earlier version that lies beside a newer one."""
        earlier = self.folder / EARLIER_FILE
        return str(too_old(earlier)) if earlier.exists() else None

    @cached_property
    def ladders(self) -> tuple[Ladder, ...]:
        """The rungs that pairs speak of, by estimator, safest first; those of a default policy where none speaks."""
        rungs = dict.fromkeys(rung for _, pairs in self.knowledge.readers for pair in pairs for rung in pair.measured)
        return ladders_of(sorted(rungs or DEFAULT_RUNGS, key=lambda rung: -rung.share))

    def banks_of(self, reader: Reader) -> list[BankEntry]:
        """The usable banks of edges that lead to a reader, in order of its slots."""
        found = [(entry, entry.header.target) for entry in self.entries if entry.header is not None]
        return [entry for slot in reader.targets for entry, target in found if target == slot]

    def counts(self, reader: Reader, bound: Bound, levels: Iterable[Level]) -> list[Count]:
        """How many pairs each level has along each ladder, and how many it takes."""
        return self._book.counts("", reader, self.ladders, bound, levels)

    def entry(self, prefix: str) -> BankEntry | ReaderEntry:
        """The one bank or reader whose digest begins so.

        Raises:
            InvalidRequest: none, or several.
        """
        found: list[BankEntry | ReaderEntry] = [*self._banks_at(prefix), *self._readers_at(prefix)]
        return self._the_one(prefix, found, "bank or reader")

    def bank(self, prefix: str) -> BankEntry:
        """The one bank whose edge begins so. Raises InvalidRequest: none, or several."""
        return self._the_one(prefix, self._banks_at(prefix), "bank")

    def reader(self, prefix: str) -> ReaderEntry:
        """The one reader whose digest begins so. Raises InvalidRequest: none, or several."""
        return self._the_one(prefix, self._readers_at(prefix), "reader")

    def choose(self, edges: Iterable[str], older_than_days: float | None, keep_bytes: int | None) -> list[BankEntry]:
        """Banks to remove: the ones named, those saved longer ago, and the oldest beyond `keep_bytes`."""
        chosen = {entry.file: entry for entry in map(self.bank, edges)}
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

    def prune(self, banks: Sequence[BankEntry], readers: Sequence[ReaderEntry], *, dry_run: bool) -> Pruned:
        """Remove banks, what pairs say about rungs that need anchors if one of theirs goes, and readers.

        Raises:
            AnchorFileError: the folder cannot be written.
        """
        if dry_run:
            header = self._header_now()
            return Pruned(len(banks), len(readers), 0 if header is None else _without(header, banks, readers)[1])
        with changing(self.folder):
            header, num_cut = self._header_now(), 0  # others may have saved since they were shown
            if header is not None:
                kept, num_cut = _without(header, banks, readers)
                if kept != header:  # first: a bank that is named and missing would only be refused
                    save_readers(self.folder, kept)
            for entry in banks:
                _remove(entry)
        return Pruned(len(banks), len(readers), num_cut)

    @cached_property
    def _book(self) -> ReaderBook:
        book = ReaderBook()
        book.put("", self.knowledge)
        return book

    def _banks_at(self, prefix: str) -> list[BankEntry]:
        return [entry for entry in self.entries if entry.edge.startswith(prefix[:NUM_DIGITS])]

    def _readers_at(self, prefix: str) -> list[ReaderEntry]:
        if self.refusal is not None:  # `ls` says so
            return []
        return [entry for entry in self.readers if entry.reader.digest.startswith(prefix)]

    def _the_one(self, prefix: str, found: Sequence[EntryT], what: str) -> EntryT:
        if len(found) != 1:
            number = f"no {what}" if not found else f"{len(found)} of them"
            raise InvalidRequest(f"{number} in {self.folder} at {prefix!r}; `kvcomm anchors ls` shows them")
        return found[0]

    def _header_now(self) -> ReadersHeader | None:
        if not any((self.folder / name).exists() for name in (READERS_FILE, EARLIER_FILE)):
            return None
        return read_readers(self.folder)


def _without(
    header: ReadersHeader, banks: Iterable[BankEntry], readers: Iterable[ReaderEntry]
) -> tuple[ReadersHeader, int]:
    """The same without banks and readers, and how many pairs are cut by it."""
    names = {entry.file.name for entry in banks}  # a damaged bank has no edge, but a name
    edges = {entry.header.edge.digest for entry in banks if entry.header}
    gone_banks = {edge for edge in header.banks if edge in edges or edge[:24] + SUFFIX in names}
    gone_readers = {entry.reader.digest for entry in readers}
    knowledge = header.knowledge()
    knowledge = knowledge._replace(
        readers=tuple(each for each in knowledge.readers if each[0].digest not in gone_readers),
        watches=tuple(each for each in knowledge.watches if each.reader not in gone_readers),
    )
    num_cut = 0
    if gone_banks:
        before, knowledge = knowledge, knowledge.without_anchors()
        num_cut = sum(
            old.measured.keys() != new.measured.keys()
            for (_, olds), (_, news) in zip(before.readers, knowledge.readers, strict=True)
            for old, new in zip(olds, news, strict=True)
        )
    left = {edge: payload for edge, payload in header.banks.items() if edge not in gone_banks}
    kept = header_of(header.namespace, knowledge, left)
    return kept.model_copy(update={"created": header.created}), num_cut


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
