"""Rows of a data set: from a file, from a folder laid out by task, or from the hub, always through `datasets`.

A folder holds one folder per task (`gsm8k/`), or is that itself; in it a split is the file whose name begins with the
split's (`test_public.jsonl`, `train_slice.jsonl.gz`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from logging import CRITICAL
from pathlib import Path

from eval.tasks.task import Row, Source
from kvcomm.errors import InvalidRequest

SUFFIXES = (".jsonl", ".jsonl.gz")


def load_rows(source: Source, split: str, data: Path | None, limit: int) -> list[Row]:
    """The first rows of a split.

    Raises:
        InvalidRequest: no such file, not readable, or the hub is out of reach; says in one line what to do.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidRequest("datasets is not installed: pip install 'kvcomm[eval]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # what goes wrong is said here, in one line
    try:
        if data is None:
            _require_hub(source)
            found = datasets.load_dataset(*source.hub, split=split)
        else:
            file = split_file(source, split, data)
            found = datasets.load_dataset("json", data_files=str(file), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = f"{source.hub[0]} on the hub" if data is None else str(data)
        raise InvalidRequest(f"{where} cannot be read: {_one_line(error)}; give --data FILE or FOLDER") from error
    return [dict(row) for row in found.select(range(min(limit, len(found))))]


def split_file(source: Source, split: str, data: Path) -> Path:
    """The file of a split.

    Raises:
        InvalidRequest: there is none.
    """
    if data.is_file():
        return data
    for folder in (data / source.folder, data):
        if found := sorted(file for file in folder.glob(f"{split}*") if file.name.endswith(SUFFIXES)):
            return found[0]
    raise InvalidRequest(f"{data} holds no {source.folder}/{split}*.jsonl or .jsonl.gz")


def digest_of(rows: Sequence[Row]) -> str:
    """SHA-256 over rows, for reports."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def _require_hub(source: Source) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise InvalidRequest(f"HF_HUB_OFFLINE is set, so {source.hub[0]} cannot be fetched; give --data FILE or FOLDER")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
