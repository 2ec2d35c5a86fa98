"""What a tenant has learned, as a folder: one file per anchor bank, and one for the readers.

The format is described in `anchors/FORMAT.md`. What pairs say about rungs that need anchors holds for the anchors they
were measured with. So the file of readers names every bank by digest; where one is missing, or another one, that part
of the pairs is left out on loading. Nothing is taken over unless all of it could be read. Who changes a folder locks
it, so two who save at once leave what one of them had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from kvcomm.align.bank import BankShape, BankSnapshot
from kvcomm.align.bank_file import SUFFIX, load_bank, read_bank_header, require_namespace, save_bank
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.edges import Edge
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import KeptWatch, Knowledge
from kvcomm.align.readers import Reader
from kvcomm.align.rung_record import RungRecord
from kvcomm.align.standings import Level
from kvcomm.align.watch import Watch
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileTooNew, AnchorFileTooOld, InvalidRequest
from kvcomm.files.reading import MAX_SHOWN, first_fault
from kvcomm.files.records import StrictRecord, require_once
from kvcomm.files.writing import locked, sweep
from kvcomm.memory.sealed_file import SealedFormat

FORMAT = SealedFormat("file of readers", "kvcomm_readers", 1, AnchorFileError, AnchorFileCorrupt, AnchorFileTooNew)
READERS_FILE = "readers.safetensors"
EARLIER_FILE = "edge-groups.safetensors"
"""Where earlier versions kept calibrations, edge by edge; nothing of them can be used for readers."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class MeasuredRecord(StrictRecord):
    """What one rung gave; `rung` is its place among the file's rungs."""

    rung: NonNegativeInt
    divergence: NonNegative
    residual: NonNegative | None


class PairRecord(StrictRecord):
    """One pair; see `align.calibration.Pair`."""

    measured: tuple[MeasuredRecord, ...]
    distances: dict[str, NonNegative]
    sources: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]

    @model_validator(mode="after")
    def _require_each_once(self) -> Self:
        require_once("rung", [each.rung for each in self.measured])
        return self

    @classmethod
    def of(cls, pair: Pair, places: Mapping[Rung, int]) -> PairRecord:
        """A pair, and where its rungs are in the file."""
        measured = [
            MeasuredRecord(rung=places[rung], divergence=each.divergence, residual=each.residual)
            for rung, each in pair.measured.items()
        ]
        return cls(measured=tuple(measured), distances=dict(pair.distances), sources=pair.sources)

    def pair(self, rungs: Sequence[Rung]) -> Pair:
        """The pair as it was. Raises ValueError for a rung that the file does not list."""
        if any(each.rung >= len(rungs) for each in self.measured):
            raise ValueError(f"a pair names a rung beyond the {len(rungs)} listed")
        measured = {rungs[each.rung]: Measured(each.divergence, each.residual) for each in self.measured}
        return Pair(measured, self.distances, Sources(*self.sources))


class WatchRecord(StrictRecord):
    """What audits say about one bound at one level; `reader` is empty for those of all requests at the level."""

    level: Literal["own", "pool", "prior"]
    reader: Digest | Literal[""]
    epsilon: NonNegative
    delta: Annotated[float, Field(gt=0, lt=1)]
    debt: NonNegative
    num_observed: NonNegativeInt
    num_violations: NonNegativeInt
    log_ratios: tuple[Finite, ...]
    tripped: bool

    @classmethod
    def of(cls, kept: KeptWatch) -> WatchRecord:
        """A watch as it is."""
        breaker, bound = kept.watch.breaker, kept.watch.bound
        return cls(
            level=kept.level.value,
            reader=kept.reader,
            epsilon=bound.max_divergence,
            delta=bound.delta,
            debt=kept.watch.debt,
            num_observed=breaker.num_observed,
            num_violations=breaker.num_violations,
            log_ratios=breaker.log_ratios,
            tripped=breaker.tripped,
        )

    def kept(self) -> KeptWatch:
        """The watch as it was. Raises InvalidRequest where its numbers do not fit each other."""
        watch = Watch(Bound(self.epsilon, self.delta))
        watch.debt = self.debt
        watch.breaker.resume(self.log_ratios, self.num_observed, self.num_violations, tripped=self.tripped)
        return KeptWatch(Level(self.level), self.reader, watch)


class ReaderRecord(StrictRecord):
    """One reader and its own pairs, the oldest first."""

    digest: Digest
    slots: tuple[str, ...]
    targets: tuple[Digest, ...]
    pairs: tuple[PairRecord, ...]


class ReadersHeader(StrictRecord):
    """All readers of a tenant, and the banks that their pairs were measured with, by digest."""

    namespace: str
    created: str
    rungs: tuple[RungRecord, ...]
    readers: tuple[ReaderRecord, ...]
    watches: tuple[WatchRecord, ...]
    head_weights: tuple[Finite, ...] | None
    banks: dict[Digest, Digest]

    @model_validator(mode="after")
    def _require_fit(self) -> Self:
        require_once("rung", [(each.estimator, each.share, each.chooser) for each in self.rungs])
        require_once("reader", [each.digest for each in self.readers])
        require_once("watch", [(each.level, each.reader, each.epsilon, each.delta) for each in self.watches])
        known = {each.digest for each in self.readers}
        for each in self.watches:
            if (each.reader not in known) if each.reader else Level(each.level) is Level.OWN:
                raise ValueError(f"a watch at level {each.level} is of reader {each.reader[:12]!r}, which is not there")
        return self

    def knowledge(self) -> Knowledge:
        """What was known.

        Raises:
            InvalidRequest, ValueError: the parts do not fit each other.
        """
        rungs = [each.rung for each in self.rungs]
        readers = tuple(
            (Reader(each.digest, each.slots, each.targets), tuple(pair.pair(rungs) for pair in each.pairs))
            for each in self.readers
        )
        return Knowledge(readers, tuple(each.kept() for each in self.watches), self.head_weights)


class Profile(NamedTuple):
    """What a folder holds.

    Attributes:
        banks: every bank.
        knowledge: readers, their pairs and watches. Where a bank that pairs were measured with is missing or another
            one, what they say about rungs that need anchors is left out.
        num_missing: banks of which that is so.
    """

    banks: tuple[BankSnapshot, ...]
    knowledge: Knowledge
    num_missing: int = 0

    @property
    def num_tokens(self) -> int:
        """Anchor tokens of all banks."""
        return sum(bank.num_tokens for bank in self.banks)

    @property
    def num_pairs(self) -> int:
        """Pairs of all readers."""
        return self.knowledge.num_pairs


def save_profile(
    folder: Path, namespace: str, shape: BankShape, banks: Iterable[BankSnapshot], knowledge: Knowledge
) -> Profile:
    """Write banks that hold anything, and what is known of readers; files of other edges stay, until they are pruned.

    Raises:
        AnchorFileError: something cannot be written; what was there under that name is untouched.
    """
    kept = tuple(bank for bank in banks if bank.num_tokens)
    with changing(folder):
        written = {bank.edge: save_bank(bank, shape, namespace, folder / bank_name(bank.edge)) for bank in kept}
        digests = {edge.digest: header.payload_blake3 for edge, header in written.items()}
        save_readers(folder, header_of(namespace, knowledge, digests))
    return Profile(kept, knowledge)


def header_of(namespace: str, knowledge: Knowledge, banks: Mapping[str, str]) -> ReadersHeader:
    """What a file of readers holds.

    Args:
        banks: edge digest -> payload digest, of all that pairs were measured with.
    """
    rungs = list(dict.fromkeys(rung for _, pairs in knowledge.readers for pair in pairs for rung in pair.measured))
    places = {rung: place for place, rung in enumerate(rungs)}
    return ReadersHeader(
        namespace=namespace,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rungs=tuple(RungRecord.of(each) for each in rungs),
        readers=tuple(
            ReaderRecord(
                digest=reader.digest,
                slots=reader.slots,
                targets=reader.targets,
                pairs=tuple(PairRecord.of(pair, places) for pair in pairs),
            )
            for reader, pairs in knowledge.readers
        ),
        watches=tuple(WatchRecord.of(kept) for kept in knowledge.watches),
        head_weights=knowledge.head_weights,
        banks=dict(banks),
    )


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep others from changing a folder, which is made if there is none; what killed writers left in it goes.

    Raises:
        AnchorFileError: it cannot be made or locked.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except OSError as error:
            raise AnchorFileError(f"{folder} cannot be written: {error.strerror or error}") from error
        sweep(folder)
        yield


@contextmanager
def looking(folder: Path) -> Iterator[None]:
    """Keep others from changing a folder while it is read, where the disk allows that.

    Raises:
        AnchorFileError: it cannot be read.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, shared=True))
        except OSError as error:
            raise AnchorFileError(f"{folder} cannot be read: {error.strerror or error}") from error
        yield


def save_readers(folder: Path, header: ReadersHeader) -> None:
    """Write the file of readers alone. Raises AnchorFileError if it cannot be written."""
    FORMAT.write(folder / READERS_FILE, header.model_dump_json(), {})


def load_profile(folder: Path, *, namespace: str, shape: BankShape) -> Profile:
    """Read a folder and check every byte of it.

    Args:
        namespace, shape: the only ones accepted.

    Raises:
        AnchorFileForeign: of another namespace, or made with other sketches.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileTooOld, AnchorFileError: as the names say.
    """
    with looking(folder):
        header = read_readers(folder)
        require_namespace(folder / READERS_FILE, header.namespace, namespace)
        files = bank_files(folder)
        banks = tuple(load_bank(file, namespace=namespace, shape=shape) for file in files)
        headers = [read_bank_header(file) for file in files]
    found = {each.edge.digest: each.payload_blake3 for each in headers}
    if len(found) < len(headers):
        raise AnchorFileCorrupt(f"{folder} holds several banks of one edge; remove all but the one that is meant")
    num_missing = sum(found.get(edge) != payload for edge, payload in header.banks.items())
    knowledge = header.knowledge()
    return Profile(banks, knowledge.without_anchors() if num_missing else knowledge, num_missing)


def read_readers(folder: Path) -> ReadersHeader:
    """The file of readers of a folder, whosever they are.

    Raises:
        AnchorFileTooOld: there is only what an earlier version has left.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: as the names say.
    """
    file = folder / READERS_FILE
    if (folder / EARLIER_FILE).exists() and not file.exists():
        raise too_old(folder / EARLIER_FILE)

    def read() -> ReadersHeader:
        with FORMAT.opened(file) as opened:
            text = FORMAT.header(file, opened)
        try:
            header = ReadersHeader.model_validate_json(text)
            header.knowledge()
        except ValidationError as error:
            raise AnchorFileCorrupt(f"{file} does not fit the format: {first_fault(error)}") from error
        except (InvalidRequest, ValueError) as error:
            raise AnchorFileCorrupt(f"{file} does not fit the format: {str(error)[:MAX_SHOWN]}") from error
        return header

    return FORMAT.settled(file, read)


def too_old(file: Path) -> AnchorFileTooOld:
    """What to say about a file of an earlier version."""
    return AnchorFileTooOld(
        f"{file} is of an earlier version, which calibrated edges instead of readers: nothing of it can be used; let "
        "the engine learn anew and save into another folder"
    )


def bank_files(folder: Path) -> list[Path]:
    """The anchor banks of a folder, by name.

    Raises:
        AnchorFileError: the folder cannot be read.
    """
    try:
        return sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIX))
    except OSError as error:
        raise AnchorFileError(f"{folder} cannot be read: {error.strerror or error}") from error


def bank_name(edge: Edge) -> str:
    """The file name of an edge's bank."""
    return edge.digest[:24] + SUFFIX
