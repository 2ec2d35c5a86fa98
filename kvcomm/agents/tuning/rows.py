"""Rows of a data file as inputs of a team, and how they are split into disjoint parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvcomm.agents.team import Team
from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import BadContent, read_lines

RULE = "rows without repetition, in order of the SHA-256 of their inputs: anchors, tuning, calibration, verification"
NUM_DIGITS = 16
"""Hex digits of a row's digest that are kept."""


class Row(NamedTuple):
    """The inputs of one run."""

    inputs: dict[str, str]
    digest: str


class Sizes(NamedTuple):
    """Rows of each part."""

    anchors: int
    tuning: int
    calibration: int
    verification: int

    @property
    def total(self) -> int:
        """Rows of all parts together."""
        return sum(self)


class Split(NamedTuple):
    """The parts themselves."""

    anchors: list[Row]
    tuning: list[Row]
    calibration: list[Row]
    verification: list[Row]


def read_rows(file: str | Path, team: Team) -> list[Row]:
    """Rows of a .jsonl or .jsonl.gz file, each once, in order of their digests.

    Raises:
        InvalidRequest: the file cannot be read, or a line is no object with the team's inputs as texts; names the line.
    """
    file = Path(file)
    try:
        rows = [_row(value, f"{file}, line {number}", team) for number, value in read_lines(file)]
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file}: {error}") from error
    return sorted({row.digest: row for row in rows}.values(), key=lambda row: row.digest)


def split_rows(rows: Sequence[Row], sizes: Sizes) -> Split:
    """The first rows, part by part; there must be enough."""
    assert len(rows) >= sizes.total, (len(rows), sizes)
    parts, first = [], 0
    for size in sizes:
        parts.append(list(rows[first : first + size]))
        first += size
    return Split(*parts)


def _row(entry: Any, where: str, team: Team) -> Row:
    names = team.required_inputs
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
        raise InvalidRequest(f"{where}: team {team.name!r} needs an object with the texts {', '.join(names)}")
    known = (*names, *team.inputs)
    inputs = {name: entry[name] for name in known if isinstance(entry.get(name), str)}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return Row(inputs, digest[:NUM_DIGITS])
