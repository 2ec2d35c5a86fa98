"""`python -m eval.fork` on a tiny model: which figures there are, no byte copied, pages as expected. Never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import fork

SIZES = [
    "--fork-tokens=100",
    "--forks=5",
    "--parent-tokens=40",
    "--branches=3",
    "--new-tokens=6",
    "--restore-tokens=33",
]


def test_figures(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"

    assert fork.main(["--model", str(tiny_folder), "--out", str(out), "--json", "--repeats=2", *SIZES]) == 0

    result = json.loads(capsys.readouterr().out)
    figures = {figure["id"]: figure for figure in result["figures"]}
    assert list(figures) == [
        "fork_ms",
        "fork_bytes",
        "branch_speedup",
        "branch_speedup_expanded",
        "branch_speedup_decode",
        "branch_pool_bytes",
        "branch_same_tokens",
        "branch_engine_s",
        "restore_speedup",
        "restore_s",
        "snapshot_bytes",
    ]
    assert figures.pop("fork_bytes")["value"] == 0
    assert all(figure["value"] > 0 for figure in figures.values())
    # Greedy in float32, and the tiny model's logits are far apart: the engine says what stock `generate` says.
    assert figures["branch_same_tokens"]["value"] == 1
    assert result["config"]["branches"] == 3
    samples = json.loads(out.read_text())["samples"]
    assert len(samples.pop("fork_s")) == 5
    assert {len(values) for values in samples.values()} == {2}


def test_pool_bytes(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 tokens are 3 pages, the last one partly filled; each of 3 branches copies that one and writes 5 more KV.

    A page is 16 tokens of 2 layers, 2 heads and 8 + 8 numbers of 4 bytes.
    """
    arguments = ["--model", str(tiny_folder), "--out", str(tmp_path / "run.json"), "--repeats=1", *SIZES]

    assert fork.main(arguments) == 0

    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("branch_pool_bytes"))
    page_bytes = 16 * 2 * 2 * (8 + 8) * 4
    assert line.split() == ["branch_pool_bytes", f"{(3 + 3) * page_bytes:,}", "bytes", "<=", f"{9 * page_bytes:,}"]
