"""A folder of data, laid out by kind of text: what files of it are there, by the beginning of their names."""

from __future__ import annotations

from pathlib import Path

from kvcomm.errors import InvalidRequest


def find(folder: Path, stem: str, endings: tuple[str, ...]) -> Path:
    """The first file whose name begins and ends like this, plain or gzipped.

    Raises:
        InvalidRequest: there is none; names what was looked for.
    """
    found = files(folder, stem, endings)
    if not found:
        raise InvalidRequest(f"{folder}: no {stem}*{' or '.join(endings)}, plain or .gz")
    return found[0]


def files(folder: Path, stem: str, endings: tuple[str, ...]) -> list[Path]:
    """Every such file, by name."""
    wanted = tuple(f"{ending}{packed}" for ending in endings for packed in ("", ".gz"))
    return sorted(file for file in folder.glob(f"{stem}*") if file.is_file() and file.name.endswith(wanted))
