"""What a run of `kvcomm tune` keeps: lines of JSON that a later run goes on from, and whose run it is.

Lines are checked when they are read: what does not have the form that was written is damage, named with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import CONFIG_BYTES, first_fault, read_bytes
from kvcomm.files.records import StrictRecord
from kvcomm.files.writing import NameTaken, locked, replacing

RUN_FILE = "run.json"
IDENTITY = TypeAdapter(dict[str, str])


class Kept(StrictRecord):
    """A line, or a file, that is kept."""


AnyKept = TypeVar("AnyKept", bound=Kept)


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Add one object; what was interrupted in the middle of a line is cut off first.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent), file.open("ab+") as out:
        end = out.seek(0, 2)
        if end:
            out.seek(0)
            whole = out.read().rfind(b"\n") + 1
            out.truncate(whole)
        out.write(json.dumps(value).encode() + b"\n")


def read_kept(file: Path, kind: type[AnyKept]) -> list[AnyKept]:
    """Every whole line; none where there is no file.

    Raises:
        InvalidRequest: it cannot be read, or a whole line is not of that kind.
    """
    try:
        lines = read_bytes(file).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            kept.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise damaged(file, f"line {number}: {first_fault(error)}") from error
    return kept


def damaged(file: Path, why: str) -> InvalidRequest:
    """The error for a file that does not hold what was kept."""
    return InvalidRequest(f"{file} is damaged: {why}; remove {file.parent} to begin anew")


def claim(folder: Path, identity: Mapping[str, str]) -> None:
    """Make sure that what lies in the folder belongs to a run on the same model, team, data and bound.

    Raises:
        InvalidRequest: it belongs to another, also to one that began at the same moment; names what differs.
        OSError: it cannot be written.
    """
    file = folder / RUN_FILE
    try:
        with replacing(file, is_new=True) as temporary:
            temporary.write_text(json.dumps(identity, indent=2) + "\n")
        return
    except NameTaken:
        pass
    try:
        found = IDENTITY.validate_json(read_bytes(file, max_bytes=CONFIG_BYTES))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise damaged(file, first_fault(error)) from error
    differing = sorted(name for name, value in identity.items() if found.get(name) != value)
    if differing:
        raise InvalidRequest(
            f"{folder} is of a run with another {', '.join(differing)}; give another --out, or remove the folder"
        )
