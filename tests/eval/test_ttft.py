"""`python -m eval.ttft`: a team in small sizes; what one run calibrates, the next one takes from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.ttft import __main__ as ttft
from kvcomm.align.profile_file import READERS_FILE
from kvcomm.reuse.cost import ReuseCost

SIZES = {"agents": 3, "role-tokens": 16, "question-tokens": 48, "output-tokens": 32, "warm": 3, "calibration": 19}


def figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    files = [f"--anchors={tmp_path / 'anchors'}", f"--out={tmp_path / 'run.json'}"]
    assert ttft.main([f"--model={folder}", "--repeats=1", "--json", *sizes, *files]) == 0
    read = capsys.readouterr()
    values = {figure["id"]: figure["value"] for figure in json.loads(read.out)["figures"]}
    return values | {"notes": read.err}


@pytest.fixture(autouse=True)
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tiny model moving hardly pays, and whether it does is measured."""
    monkeypatch.setattr(ReuseCost, "is_worth_it", lambda self, *_: True)


def test_a_calibrated_team(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = figures(tiny_folder, tmp_path, capsys)
    assert (tmp_path / "anchors" / READERS_FILE).exists()
    assert "calibration: text 1 of 19" in first["notes"]
    again = figures(tiny_folder, tmp_path, capsys)
    assert "of 2 readers taken from" in again["notes"]
    assert "calibration: text" not in again["notes"]
    for values in (first, again):
        assert values["aligned"] == 1.0
        # Nothing but the glue: the last agent's three pieces of it, and what stands before its answer.
        assert 0 < values["computed"] < 3 * 16
        assert abs(values["exact_hit_computed"] - values["computed"]) <= 1
        assert 0 < values["divergence"] < 1
        assert values["agent3_speedup"] == pytest.approx(values["dense_3_s"] / values["kvcomm_3_s"])
    assert again["divergence"] == pytest.approx(first["divergence"], rel=1e-3)

    assert ttft.main([f"--model={tiny_folder}", f"--anchors={tmp_path / 'anchors'}", "--agents=5"]) == 1
    assert "holds 2 readers, not one for each of agents 2 to 5" in capsys.readouterr().err


def test_quick(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures without a calibration: glue only is served with no bound, nothing under one."""
    sizes = ["--agents=3", "--role-tokens=16", "--question-tokens=48", "--output-tokens=32"]
    arguments = [f"--model={tiny_folder}", f"--out={tmp_path / 'run.json'}", "--quick", "--json", *sizes]
    assert ttft.main(arguments) == 0
    read = capsys.readouterr()
    values = {figure["id"]: figure["value"] for figure in json.loads(read.out)["figures"]}
    assert "calibration" not in read.err
    assert values["aligned"] == 1.0
    assert 0 < values["divergence"] < 1
    assert values["aligned_bound"] == values["divergence_bound"] == 0.0
    assert {"agent3_speedup", "sum_speedup", "agent3_speedup_bound", "sum_speedup_bound", "over_exact_hit"} < set(
        values
    )

    assert ttft.main([*arguments, f"--anchors={tmp_path / 'anchors'}"]) == 1
    assert "--quick calibrates nothing that --anchors could keep" in capsys.readouterr().err
