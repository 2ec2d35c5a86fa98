"""Rows of a data set: from a file, from a folder laid out by task, or from the hub, always through `datasets`.

A folder holds one folder per task (`gsm8k/`), or is that itself; in it a split is the file whose name begins with the
split's (`test_public.jsonl`, `train_slice.jsonl.gz`). A file is the rows to ask; the other splits are looked for beside
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from logging import CRITICAL
from pathlib import Path

from eval.tasks.task import Row, Source, Split
from kvcomm.errors import InvalidRequest
from kvcomm.lab.files import open_regular

SUFFIXES = (".jsonl", ".jsonl.gz")


def load_rows(source: Source, split: Split, data: Path | None) -> list[Row]:
    """The rows of a split.

    Args:
        data: a file with these rows, or a folder; None: the hub.

    Raises:
        InvalidRequest: no such file, not readable, a row lacks a field, or the hub is out of reach; says in one line
            what to do.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidRequest("datasets is not installed: pip install 'kvcomm[eval]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # what goes wrong is said here, in one line
    if data is None:
        _require_hub(source)
    file = None if data is None else split_file(source, split, data)
    if file is not None:
        _require_regular(file)
    try:
        if file is None:
            found = datasets.load_dataset(*source.hub, split=split.hub)
        else:
            found = datasets.load_dataset("json", data_files=str(file), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = f"{source.hub[0]} on the hub" if file is None else str(file)
        raise InvalidRequest(f"{where} cannot be read: {_one_line(error)}; give --data FILE or FOLDER") from error
    rows = [dict(row) for row in found]
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in source.fields if row.get(name) is None]:
            raise InvalidRequest(
                f"row {number} of {file or source.hub[0]} has no {', '.join(missing)}; rows of {source.folder} need "
                f"{', '.join(source.fields)}"
            )
    return rows


def load_train_rows(source: Source, train: Path | None, data: Path | None) -> list[Row]:
    """The rows to learn from: those in `train`, else those beside the rows to ask.

    Raises:
        InvalidRequest: as `load_rows`, or there is no such file beside `data`.
    """
    where = train or beside(source.train, data)
    if data is not None and where is None:
        raise InvalidRequest(f"{data} has no {source.train.file}* beside it; give --train FILE")
    return load_rows(source, source.train, where)


def split_file(source: Source, split: Split, data: Path) -> Path:
    """The file of a split: `data` itself, or in the folder `data`.

    Raises:
        InvalidRequest: there is none.
    """
    if data.exists() and not data.is_dir():
        return data
    for folder in (data / source.folder, data):
        if found := _files_of(split, folder):
            return found[0]
    what = "no such file or folder" if not data.exists() else f"no {source.folder}/{split.file}*.jsonl or .jsonl.gz"
    raise InvalidRequest(f"{data}: {what}; give --data FILE or FOLDER")


def beside(split: Split, data: Path | None) -> Path | None:
    """Where another split than the rows to ask is: `data`, if that is no file, else the file beside it, if there is."""
    if data is None or not data.is_file():
        return data
    return next((file for file in _files_of(split, data.parent) if file != data), None)


def chosen(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """The first rows, or for another seed than 0 a random choice of so many."""
    return list(rows[:limit]) if not seed else random.Random(seed).sample(list(rows), min(limit, len(rows)))


def digest_of(rows: Sequence[Row]) -> str:
    """SHA-256 over rows, for reports."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def _files_of(split: Split, folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(f"{split.file}*") if file.name.endswith(SUFFIXES))


def _require_regular(file: Path) -> None:
    """What `datasets` opens itself has to be a file that ends."""
    try:
        with open_regular(file):
            pass
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}; give --data FILE or FOLDER") from error


def _require_hub(source: Source) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise InvalidRequest(f"HF_HUB_OFFLINE is set, so {source.hub[0]} cannot be fetched; give --data FILE or FOLDER")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
