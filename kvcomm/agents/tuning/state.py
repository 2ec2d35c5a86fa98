"""What a run of `kvcomm tune` keeps: lines of JSON that a later run goes on from, and whose run it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcomm.errors import InvalidRequest

RUN_FILE = "run.json"


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Add one object; what was interrupted in the middle of a line is cut off first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        end = out.seek(0, 2)
        if end:
            out.seek(0)
            whole = out.read().rfind(b"\n") + 1
            out.truncate(whole)
        out.write(json.dumps(value).encode() + b"\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Every whole line; none where there is no file.

    Raises:
        InvalidRequest: a whole line is not JSON.
    """
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InvalidRequest(f"{file} is damaged: {error}; remove {file.parent} to begin anew") from error


def claim(folder: Path, identity: Mapping[str, str]) -> None:
    """Make sure that what lies in the folder belongs to a run on the same model, team, data and bound.

    Raises:
        InvalidRequest: it belongs to another; names what differs.
    """
    file = folder / RUN_FILE
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise InvalidRequest(f"{file} is damaged: {error}; remove {folder} to begin anew") from error
        differing = sorted(name for name, value in identity.items() if found.get(name) != value)
        if differing:
            raise InvalidRequest(
                f"{folder} is of a run with another {', '.join(differing)}; give another --out, or remove the folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity, indent=2) + "\n")
