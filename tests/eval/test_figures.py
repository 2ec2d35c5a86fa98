"""Figures and reports: the object for machines, the table for people, the file of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval.figures import Figure, Report, format_number, stdout_kept

REPORT = Report(
    "test",
    [Figure("speedup", 12.3456, "x", (11.0, 13.5), ">= 12"), Figure("num_bytes", 4096, "bytes")],
    {"repeats": 3},
    {"seconds": [0.5, 0.25]},
)
EXPECTED = {
    "figures": [
        {"id": "speedup", "value": 12.3456, "unit": "x", "spread": [11.0, 13.5]},
        {"id": "num_bytes", "value": 4096, "unit": "bytes", "spread": None},
    ],
    "config": {"repeats": 3},
}


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    REPORT.emit(as_json=True)

    assert json.loads(capsys.readouterr().out) == EXPECTED


def test_as_table(capsys: pytest.CaptureFixture[str]) -> None:
    REPORT.emit(as_json=False)

    name, header, *rows = capsys.readouterr().out.splitlines()
    assert name.split() == ["test"]
    assert header.split() == ["figure", "value", "unit", "quartiles", "wanted"]
    assert [row.split() for row in rows] == [
        ["speedup", "12.35", "x", "11", "..", "13.5", ">=", "12"],
        ["num_bytes", "4,096", "bytes"],
    ]


def test_file_of_a_run(tmp_path: Path) -> None:
    """It holds what --json prints, the raw samples, and where they come from; the folder is made."""
    file = tmp_path / "new" / "run.json"

    REPORT.save(file)

    saved = json.loads(file.read_text())
    assert {key: saved[key] for key in EXPECTED} == EXPECTED
    assert saved["samples"] == {"seconds": [0.5, 0.25]}
    assert saved["environment"].keys() >= {"date", "command", "commit", "dirty", "python", "packages", "machine"}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234567, "1,234,567"), (2.0, "2"), (0.012345, "0.01235"), (1234.5, "1234")]
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_what_others_write_to_stdout_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """Also what code that is not Python's writes: stdout has one JSON object, or a table."""
    with stdout_kept():
        os.write(1, b"by others\n")
    os.write(1, b"the report\n")
    assert capfd.readouterr() == ("the report\n", "by others\n")
