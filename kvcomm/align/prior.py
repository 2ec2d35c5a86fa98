"""The prior: pairs that ship with a model, so that a new reader moves text from its first requests on.

Measured over unlike workloads, for rungs that need no anchors; each pair says in which workload. A prior holds for one
model (weights, dtype, rope, tokenizer, chat template) and is refused for any other. With it come the weights by which
rungs choose tokens, since heads are the model's. The file is JSON, see `anchors/FORMAT.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.ladder import Rung
from kvcomm.align.rung_record import RungRecord
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign, AnchorFileTooNew, InvalidRequest
from kvcomm.files.reading import CONFIG_BYTES, BadContent, first_fault, parse_json, read_bytes
from kvcomm.files.records import StrictRecord, require_once
from kvcomm.files.writing import replacing

FORMAT = 1
FILE = "prior.json"

Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Prior:
    """What is known of a model before anybody has used it.

    Attributes:
        model: digest of what it holds for, see `Engine.prior_model`.
        pairs: by workload.
        head_weights: one per head that is looked at, see `importance`; None: all alike.
    """

    model: str
    pairs: Mapping[str, Sequence[Pair]]
    head_weights: tuple[float, ...] | None = None

    def without(self, workload: str) -> Prior:
        """The same, but for the pairs of one workload: for evaluations on it."""
        return Prior(
            self.model, {name: each for name, each in self.pairs.items() if name != workload}, self.head_weights
        )

    @property
    def all_pairs(self) -> tuple[Pair, ...]:
        """Pairs of all workloads, as many of each: those of the smallest number, the first ones."""
        num_each = min((len(pairs) for pairs in self.pairs.values()), default=0)
        return tuple(pair for pairs in self.pairs.values() for pair in pairs[:num_each])


class _PairRecord(StrictRecord):
    """`divergences` and `residuals` in the order of the file's rungs."""

    divergences: tuple[Nats, ...]
    residuals: tuple[Nats | None, ...]
    sources: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]


class _PriorRecord(StrictRecord):
    format: Literal[1]
    model: str
    name: str
    rungs: tuple[RungRecord, ...]
    head_weights: tuple[Finite, ...] | None
    workloads: dict[str, Annotated[tuple[_PairRecord, ...], Field(min_length=1)]]

    @model_validator(mode="after")
    def _require_fit(self) -> Self:
        require_once("rung", [(each.estimator, each.share, each.chooser) for each in self.rungs])
        for workload, pairs in self.workloads.items():
            for pair in pairs:
                if not len(pair.divergences) == len(pair.residuals) == len(self.rungs):
                    raise ValueError(
                        f"a pair of {workload!r} does not have a value for each of {len(self.rungs)} rungs"
                    )
        return self


def shipped_priors() -> Iterator[Path]:
    """Files of every prior that comes with kvcomm."""
    folder = Path(str(files("kvcomm"))) / "anchors"
    yield from sorted(folder.glob(f"*/{FILE}"))


def read_prior(file: str | Path) -> Prior:
    """Read a prior.

    Raises:
        AnchorFileError: it cannot be read.
        AnchorFileTooNew: of a later format.
        AnchorFileCorrupt: not what the format says; names the field.
    """
    file = Path(file)
    try:
        content = read_bytes(file, max_bytes=CONFIG_BYTES)
        value = parse_json(content)
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise AnchorFileCorrupt(f"{file} is not a JSON file: {error}") from error
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise AnchorFileTooNew(
            f"{file} has a format later than {FORMAT}, the last one that this version reads; update it"
        )
    try:
        record = _PriorRecord.model_validate_json(content)
    except ValidationError as error:
        raise AnchorFileCorrupt(f"{file} does not fit the format of priors: {first_fault(error)}") from error
    rungs = [each.rung for each in record.rungs]
    pairs = {workload: tuple(_pair(each, rungs) for each in listed) for workload, listed in record.workloads.items()}
    return Prior(record.model, pairs, record.head_weights)


def write_prior(prior: Prior, file: Path, *, name: str) -> None:
    """Write a prior; it appears whole or not at all. Distances are left out: rungs that need no anchors have none.

    Args:
        name: of the model, for people.

    Raises:
        InvalidRequest: a workload has no pairs, or a pair not the rungs of the others.
        AnchorFileError: it cannot be written.
    """
    rungs = list(next((pair.measured for pairs in prior.pairs.values() for pair in pairs), {}))
    for workload, pairs in prior.pairs.items():
        if not pairs or any(pair.measured.keys() != set(rungs) for pair in pairs):
            raise InvalidRequest(
                f"the pairs of {workload!r} cannot be part of a prior: every workload has some, and all pairs have the "
                f"same rungs, here {', '.join(map(str, rungs)) or 'none'}"
            )
    record = _PriorRecord(
        format=1,
        model=prior.model,
        name=name,
        rungs=tuple(RungRecord.of(each) for each in rungs),
        head_weights=prior.head_weights,
        workloads={workload: tuple(_record(pair, rungs) for pair in pairs) for workload, pairs in prior.pairs.items()},
    )
    try:
        with replacing(file) as temporary:
            temporary.write_text(record.model_dump_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be written: {error.strerror or error}") from error


def find_prior(model: str) -> Prior | None:
    """The prior that comes with kvcomm for a model; None: there is none."""
    for file in shipped_priors():
        prior = read_prior(file)
        if prior.model == model:
            return prior
    return None


def require_prior_fits(prior: Prior, model: str) -> None:
    """Raises AnchorFileForeign for a prior of another model."""
    if prior.model != model:
        raise AnchorFileForeign(
            f"this prior was measured on another model ({prior.model[:12]}, not {model[:12]}); leave it out, and the "
            "engine learns from its own requests"
        )


def _record(pair: Pair, rungs: Sequence[Rung]) -> _PairRecord:
    measured = [pair.measured[rung] for rung in rungs]
    return _PairRecord(
        divergences=tuple(each.divergence for each in measured),
        residuals=tuple(each.residual for each in measured),
        sources=pair.sources,
    )


def _pair(record: _PairRecord, rungs: Sequence[Rung]) -> Pair:
    values = zip(rungs, record.divergences, record.residuals, strict=True)
    measured = {rung: Measured(divergence, residual) for rung, divergence, residual in values}
    return Pair(measured, {}, Sources(*record.sources))
