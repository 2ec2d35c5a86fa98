"""A tuned profile: the settings chosen for a model and a team, what was measured, and what it holds for.

A TOML file, and beside it the pairs of the team's readers for rungs that need no anchors, as JSON: with these two text
moves from the first request on. A folder of the same name may hold more: in `banks/` anchors, and pairs that were
measured with them, which are used where they are there. The format is described in `anchors/FORMAT.md`; files are read
strictly, and nothing is taken from them that does not fit the model and the team.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from kvcomm.align.ladder import Rung
from kvcomm.align.levels import Knowledge
from kvcomm.align.profile_file import ReadersHeader, header_of
from kvcomm.config import EngineConfig
from kvcomm.errors import (
    AnchorFileCorrupt,
    AnchorFileError,
    AnchorFileForeign,
    AnchorFileTooNew,
    AnchorFileTooOld,
    InvalidRequest,
)
from kvcomm.files.reading import MAX_SHOWN, BadContent, first_fault, open_regular, read_bytes, read_toml
from kvcomm.files.records import StrictRecord
from kvcomm.files.writing import replacing
from kvcomm.reuse.policy import ReusePolicy

FORMAT = 2
PAIRS = ".pairs.json"
"""Ends the name of the file of pairs."""
BANKS = "banks"

Share = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelTable(StrictRecord):
    """The model: its name as it was given, and the namespace that it must have."""

    name: str
    namespace: str


class TeamTable(StrictRecord):
    """The team: its name as it was given, and the digest that it must have."""

    name: str
    digest: str


class DataTable(StrictRecord):
    """Digests of the rows of every part."""

    file: str
    rule: str
    anchors: tuple[str, ...]
    tuning: tuple[str, ...]
    calibration: tuple[str, ...]
    verification: tuple[str, ...]

    @property
    def used(self) -> frozenset[str]:
        """Every row that the profile has seen."""
        return frozenset((*self.anchors, *self.tuning, *self.calibration, *self.verification))


class BoundTable(StrictRecord):
    """What was asked for."""

    max_divergence: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    basis: Literal["prior", "pool", "own"]


class SettingsTable(StrictRecord):
    """What was chosen for the engine."""

    neighbors: PositiveInt
    alpha: Annotated[tuple[Nats, ...], Field(min_length=1)]
    sketch_groups: PositiveInt
    sketch_layers: PositiveInt
    anchor_bytes: PositiveInt


class AgentTable(StrictRecord):
    """One agent's reader, by digest, and its calibration pairs."""

    reader: str
    num_pairs: NonNegativeInt


class VerificationTable(StrictRecord):
    """What would have been accepted along one ladder, on the rows that nothing was chosen by."""

    requests: NonNegativeInt
    accepted: NonNegativeInt
    violations: NonNegativeInt
    share: Share
    low: Share
    high: Share
    limit: float
    aligned: Share
    holds: bool


class PointTable(StrictRecord):
    """One way to reuse, on the tuning rows."""

    setting: str
    computed: Share
    divergence: Nats
    agreement: Share
    on_front: bool


class ValidityTable(StrictRecord):
    """What the profile holds for, and with what it was made."""

    holds_for: str
    made: str
    budget_s: float
    versions: dict[str, str]


class PairsTable(StrictRecord):
    """The file of pairs: SHA-256 (hex) of its bytes."""

    digest: str


class TuningProfile(StrictRecord):
    """The whole file. `ladders` and `verification`: by estimator, the ladder first that computes least."""

    format: Literal[2]
    model: ModelTable
    team: TeamTable
    bound: BoundTable
    settings: SettingsTable
    ladders: Annotated[dict[str, Annotated[tuple[Share, ...], Field(min_length=1)]], Field(min_length=1)]
    verification: dict[str, VerificationTable]
    agents: dict[str, AgentTable]
    validity: ValidityTable
    data: DataTable
    pairs: PairsTable
    banks: dict[str, str]
    pareto: tuple[PointTable, ...]

    def config(self, base: EngineConfig | None = None) -> EngineConfig:
        """An engine's settings under this profile; what it does not speak of is as in `base`."""
        values = vars(base or EngineConfig()) | {
            name: getattr(self.settings, name)
            for name in ("neighbors", "alpha", "sketch_groups", "sketch_layers", "anchor_bytes")
        }
        return EngineConfig.from_mapping(values)

    def policy(self) -> ReusePolicy:
        """The bound, and how it was earned."""
        rungs = tuple(Rung(estimator, share) for estimator, shares in self.ladders.items() for share in shares)
        return ReusePolicy(self.bound.max_divergence, self.bound.confidence, self.bound.basis, rungs)


def state_folder(file: Path) -> Path:
    """The folder beside a profile, with its banks, if they are there, and the state of its making."""
    if file.suffix != ".toml":
        raise InvalidRequest(f"{file} must end in .toml: a folder of the same name without it keeps the banks")
    return file.with_suffix("")


def pairs_file(file: Path) -> Path:
    """The file of pairs beside a profile."""
    return file.with_suffix(PAIRS)


def read_profile(file: str | Path) -> TuningProfile:
    """Read a profile.

    Raises:
        AnchorFileError: it cannot be read.
        AnchorFileTooNew: of a later format.
        AnchorFileTooOld: of format 1.
        AnchorFileCorrupt: not TOML, or not what the format says; names the field.
    """
    file = Path(file)
    try:
        table = read_toml(file)
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise AnchorFileCorrupt(f"{file} is not a TOML file: {error}") from error
    found = table.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise AnchorFileTooNew(f"{file} has format {found}; this version reads format {FORMAT}")
    if found == 1:
        raise AnchorFileTooOld(
            f"{file} has format 1, whose calibration belonged to tuples of edges; tune anew with `kvcomm tune --out`"
        )
    try:
        profile = TuningProfile.model_validate_json(json.dumps(table, default=str))
        profile.policy()
        profile.config()
    except ValidationError as error:
        raise AnchorFileCorrupt(f"{file} does not fit the format of profiles: {first_fault(error)}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise AnchorFileCorrupt(f"{file} does not fit the format of profiles: {str(error)[:MAX_SHOWN]}") from error
    return profile


def require_fit(profile: TuningProfile, file: Path, namespace: str, team_digest: str | None) -> None:
    """Raises AnchorFileForeign for a profile of another model or team."""
    if profile.model.namespace != namespace:
        raise AnchorFileForeign(
            f"{file} was tuned for another model than this one: {profile.model.name!r} "
            f"({profile.model.namespace[:12]}, not {namespace[:12]}); give that one, or tune anew"
        )
    if team_digest is not None and profile.team.digest != team_digest:
        raise AnchorFileForeign(
            f"{file} was tuned for another team: {profile.team.name!r} as it was then "
            f"({profile.team.digest[:12]}, not {team_digest[:12]}); tune anew"
        )


def fitting_banks(profile: TuningProfile, file: Path) -> Path | None:
    """The folder of a profile's banks; None where there are none, which is nothing amiss.

    Raises:
        AnchorFileCorrupt: there are some, but not those that it names.
    """
    folder = state_folder(file) / BANKS
    found = bank_digests(folder)
    for name in sorted(found.keys() | profile.banks.keys()) if found else ():
        if found.get(name) != profile.banks.get(name):
            how = "is missing" if name not in found else "is not named" if name not in profile.banks else "was altered"
            raise AnchorFileCorrupt(
                f"{file}: bank {name} {how}; restore it, remove {folder} to go without banks, or tune anew"
            )
    return folder if found else None


def read_pairs(profile: TuningProfile, file: Path) -> Knowledge:
    """What the file of pairs beside a profile says.

    Raises:
        AnchorFileError: it cannot be read.
        AnchorFileCorrupt: it is not the one that the profile names.
    """
    beside = pairs_file(file)
    try:
        content = read_bytes(beside)
    except OSError as error:
        raise AnchorFileError(
            f"{beside} cannot be read: {error.strerror or error}; copy it beside {file.name}, or tune anew"
        ) from error
    if hashlib.sha256(content).hexdigest() != profile.pairs.digest:
        raise AnchorFileCorrupt(f"{beside} was altered, or belongs to another profile; restore it, or tune anew")
    try:
        header = ReadersHeader.model_validate_json(content)
        return header.knowledge()
    except ValidationError as error:
        raise AnchorFileCorrupt(f"{beside} does not fit the format: {first_fault(error)}") from error
    except (InvalidRequest, ValueError) as error:
        raise AnchorFileCorrupt(f"{beside} does not fit the format: {str(error)[:MAX_SHOWN]}") from error


def write_pairs(file: Path, namespace: str, knowledge: Knowledge) -> PairsTable:
    """Write what is known of readers without anchors beside a profile. Raises AnchorFileError if that fails."""
    known = knowledge.without_anchors()._replace(watches=())
    content = header_of(namespace, known, {}).model_dump_json().encode() + b"\n"
    try:
        with replacing(pairs_file(file)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise AnchorFileError(f"{pairs_file(file)} cannot be written: {error.strerror or error}") from error
    return PairsTable(digest=hashlib.sha256(content).hexdigest())


def bank_digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file in a folder of banks, by name; nothing where there is none.

    Raises:
        AnchorFileError: one cannot be read.
    """
    return {file.name: _digest(file) for file in sorted(folder.glob("*.safetensors"))}


def _digest(file: Path) -> str:
    try:
        with open_regular(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be read: {error.strerror or error}") from error


COMMENTS = {
    "model": "Digest of weights, dtype, rope, attention settings, tokenizer, chat template and tenant: no other fits.",
    "team": "Digest of all agents' texts and sampling: a changed prompt is another team.",
    "bound": "At most so many nats, mean KL(exact || reused) over 32 tokens, with this probability, on these grounds.",
    "settings": "Chosen by divergence on the tuning rows.",
    "ladders": "Shares of the moved tokens that are computed, the safest first; `token` needs the banks.",
    "verification": "On rows by which nothing was chosen, ladder by ladder; low and high are the 95 % Wilson\n"
    "# interval of violations, `limit` is delta + 2 standard errors, `aligned` the share of the accepted requests'\n"
    "# moved tokens that need not be computed.",
    "validity": "A calibration promises nothing about texts of another kind: `kvcomm tune --check` looks at yours.",
    "data": "Which rows were used for what, by digest; a check leaves them out.",
    "pairs": "SHA-256 of the file beside this one: what the team's readers have shown on rungs without anchors.",
    "banks": "SHA-256 of the files in the folder beside this one. They are used where they are there.",
}


def write_profile(profile: TuningProfile, file: Path) -> None:
    """Write a commented TOML file; it appears whole or not at all. Raises AnchorFileError if it cannot be written."""
    values = profile.model_dump(mode="json")
    lines = ["# Made by `kvcomm tune`; see anchors/FORMAT.md.", f"format = {values.pop('format')}"]
    points, agents = values.pop("pareto"), values.pop("agents")
    for name, table in values.items():
        lines += ["", f"# {COMMENTS[name]}", *_table(name, table)]
    for name, table in agents.items():
        lines += ["", *_table(f"agents.{_key(name)}", table)]
    lines += ["", "# Share of the moved tokens computed, mean nats, share of tokens whose first choice stays the same."]
    for point in points:
        lines += ["[[pareto]]", *(f"{key} = {_value(value)}" for key, value in point.items())]
    try:
        with replacing(file) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise AnchorFileError(f"{file} cannot be written: {error.strerror or error}") from error


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    plain = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    inner = [
        line
        for key, value in values.items()
        if isinstance(value, dict)
        for line in _table(f"{name}.{_key(key)}", value)
    ]
    return [f"[{name}]", *plain, *inner]


def _key(name: str) -> str:
    return (
        name if name.replace("_", "").replace("-", "").isascii() and name.replace("_", "").isalnum() else _value(name)
    )


def _value(value: object) -> str:
    """A TOML value; JSON's texts, numbers and truth values are TOML's, but for one control character."""
    if isinstance(value, list):
        if len(value) > 4:
            return "[\n" + "".join(f"    {_value(item)},\n" for item in value) + "]"
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
