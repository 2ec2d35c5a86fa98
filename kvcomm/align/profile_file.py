"""What a tenant has learned, as a folder: one file per anchor bank, and one for the edge groups.

The format is described in `anchors/FORMAT.md`. A group's calibration holds for the anchors it was made with, so the
file names every bank by digest, and groups whose banks are missing or others are left out on loading. Nothing is taken
over unless all of it could be read. Who changes a folder locks it, so two who save at once leave what one of them had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from kvcomm.align.bank import BankShape, BankSnapshot
from kvcomm.align.bank_file import SUFFIX, load_bank, read_bank_header, require_namespace, save_bank
from kvcomm.align.bound import Bound
from kvcomm.align.breaker import Breaker
from kvcomm.align.calibration import Calibration, Pair
from kvcomm.align.edges import Edge
from kvcomm.align.groups import Contest, EdgeGroup, GroupKey
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileTooNew, InvalidRequest
from kvcomm.files.reading import MAX_SHOWN, first_fault
from kvcomm.files.writing import locked, sweep
from kvcomm.memory.sealed_file import SealedFormat

FORMAT = SealedFormat(
    "file of edge groups", "kvcomm_edge_groups", 2, AnchorFileError, AnchorFileCorrupt, AnchorFileTooNew
)
GROUPS_FILE = "edge-groups.safetensors"

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EdgeRecord(_Strict):
    """One moved segment of a group, and the digest of the bank that corrects it; None: it has no bank of its own."""

    source: str
    target: str
    slot: str
    source_slot: str
    is_exact: bool
    bank: str | None

    @property
    def edge(self) -> Edge:
        """The edge itself."""
        return Edge(self.source, self.target, self.slot, self.source_slot)


class PairRecord(_Strict):
    """One pair of the calibration."""

    divergences: tuple[NonNegative, ...]
    distance: NonNegative
    residuals: tuple[NonNegative | None, ...]


class BreakerRecord(_Strict):
    """The audits under one bound."""

    epsilon: NonNegative
    delta: Annotated[float, Field(gt=0, lt=1)]
    num_observed: NonNegativeInt
    num_violations: NonNegativeInt
    log_ratios: tuple[Finite, ...]
    tripped: bool


class GroupRecord(_Strict):
    """One edge group."""

    edges: tuple[EdgeRecord, ...]
    estimator: str
    shares: tuple[NonNegative, ...]
    strengths: tuple[NonNegative, ...]
    contest_totals: tuple[NonNegative, ...]
    contest_prompts: NonNegativeInt
    contest_wanted: PositiveInt
    head_weights: tuple[Finite, ...] | None
    pairs: tuple[PairRecord, ...]
    breakers: tuple[BreakerRecord, ...]

    @classmethod
    def of(cls, group: EdgeGroup, banks: dict[Edge, str]) -> GroupRecord:
        """A group, and the digests of the banks there are."""
        key = group.key
        edges = [
            EdgeRecord(
                source=edge.source,
                target=edge.target,
                slot=edge.slot,
                source_slot=edge.source_slot,
                is_exact=is_exact,
                bank=banks.get(edge),
            )
            for edge, is_exact in key.edges
        ]
        pairs = [
            PairRecord(divergences=pair.divergences, distance=pair.distance, residuals=pair.residuals)
            for pair in group.calibration.pairs
        ]
        breakers = [
            BreakerRecord(
                epsilon=epsilon,
                delta=delta,
                num_observed=breaker.num_observed,
                num_violations=breaker.num_violations,
                log_ratios=tuple(breaker.log_ratios),
                tripped=breaker.tripped,
            )
            for (epsilon, delta), breaker in group.breakers.items()
        ]
        return cls(
            edges=tuple(edges),
            estimator=key.estimator,
            shares=key.shares,
            strengths=group.strengths,
            contest_totals=tuple(group.contest.totals),
            contest_prompts=group.contest.num_prompts,
            contest_wanted=group.contest.num_wanted,
            head_weights=group.head_weights,
            pairs=tuple(pairs),
            breakers=tuple(breakers),
        )

    def group(self) -> EdgeGroup:
        """The group as it was.

        Raises:
            InvalidRequest, ValueError: the parts do not fit each other.
        """
        key = GroupKey(tuple((each.edge, each.is_exact) for each in self.edges), self.estimator, self.shares)
        if not self.edges or not self.shares or len(self.contest_totals) != len(self.strengths):
            raise ValueError("a group needs edges, rungs, and a total for every strength")
        group = EdgeGroup(key, self.strengths, self.contest_wanted)
        group.contest = Contest(self.strengths, self.contest_wanted, list(self.contest_totals), self.contest_prompts)
        pairs = [Pair(pair.divergences, pair.distance, pair.residuals) for pair in self.pairs]
        group.calibration = Calibration(len(self.shares), pairs)
        group.head_weights = self.head_weights
        for each in self.breakers:
            breaker = Breaker(each.delta)
            breaker.resume(each.log_ratios, each.num_observed, each.num_violations, tripped=each.tripped)
            group.breakers[Bound(each.epsilon, each.delta)] = breaker
        return group


class GroupsHeader(_Strict):
    """All groups of a tenant."""

    namespace: str
    created: str
    groups: tuple[GroupRecord, ...]


class Profile(NamedTuple):
    """What a folder holds.

    Attributes:
        banks: every bank.
        groups: whose banks are all there.
        num_dropped: groups left out because a bank is missing or another one.
    """

    banks: tuple[BankSnapshot, ...]
    groups: tuple[EdgeGroup, ...]
    num_dropped: int = 0

    @property
    def num_tokens(self) -> int:
        """Anchor tokens of all banks."""
        return sum(bank.num_tokens for bank in self.banks)

    @property
    def num_pairs(self) -> int:
        """Calibration pairs of all groups."""
        return sum(group.calibration.num_pairs for group in self.groups)


def save_profile(
    folder: Path, namespace: str, shape: BankShape, banks: Iterable[BankSnapshot], groups: Iterable[EdgeGroup]
) -> Profile:
    """Write banks that hold anything, and groups; files of other edges stay, until they are pruned.

    Raises:
        AnchorFileError: something cannot be written; what was there under that name is untouched.
    """
    kept, all_groups = tuple(bank for bank in banks if bank.num_tokens), tuple(groups)
    with changing(folder):
        written = {bank.edge: save_bank(bank, shape, namespace, folder / bank_name(bank.edge)) for bank in kept}
        digests = {edge: header.payload_blake3 for edge, header in written.items()}
        save_groups(folder, namespace, [GroupRecord.of(group, digests) for group in all_groups])
    return Profile(kept, all_groups)


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


def save_groups(folder: Path, namespace: str, records: Sequence[GroupRecord]) -> None:
    """Write the file of edge groups alone. Raises AnchorFileError if it cannot be written."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    header = GroupsHeader(namespace=namespace, created=created, groups=tuple(records))
    FORMAT.write(folder / GROUPS_FILE, header.model_dump_json(), {})


def load_profile(folder: Path, *, namespace: str, shape: BankShape) -> Profile:
    """Read a folder and check every byte of it.

    Args:
        namespace, shape: the only ones accepted.

    Raises:
        AnchorFileForeign: of another namespace, or made with other sketches.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: as the names say.
    """
    with looking(folder):
        header = read_groups(folder)
        require_namespace(folder / GROUPS_FILE, header.namespace, namespace)
        files = bank_files(folder)
        banks = tuple(load_bank(file, namespace=namespace, shape=shape) for file in files)
        digests = {read_bank_header(file).payload_blake3 for file in files}
    groups = tuple(record.group() for record in header.groups if _is_whole(record, digests))
    return Profile(banks, groups, len(header.groups) - len(groups))


def read_groups(folder: Path) -> GroupsHeader:
    """The edge groups of a folder, whosever they are.

    Raises:
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: as the names say.
    """
    file = folder / GROUPS_FILE

    def read() -> GroupsHeader:
        with FORMAT.opened(file) as opened:
            text = FORMAT.header(file, opened)
        try:
            header = GroupsHeader.model_validate_json(text)
            for record in header.groups:
                record.group()
        except ValidationError as error:
            raise AnchorFileCorrupt(f"{file} does not fit the format: {first_fault(error)}") from error
        except (InvalidRequest, ValueError) as error:
            raise AnchorFileCorrupt(f"{file} does not fit the format: {str(error)[:MAX_SHOWN]}") from error
        return header

    return FORMAT.settled(file, read)


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


def _is_whole(record: GroupRecord, digests: set[str]) -> bool:
    return all(each.bank is None or each.bank in digests for each in record.edges)
