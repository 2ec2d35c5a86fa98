"""`python -m eval.kernels` on a tiny model: which figures there are, and that bytes are counted right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import kernels


def test_figures_and_bytes(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    sizes = ["--tokens=20", "--k=3", "--anchors=7", "--repeats=2"]
    assert kernels.main(["--model", str(tiny_folder), "--out", str(out), "--json", *sizes]) == 0
    result = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in result["figures"]}
    # Two layers, two heads of 8 channels, float32; one layer has offsets: int8 codes and a float32 scale, K and V.
    kv = 2 * 2 * (2 * 8) * 4
    assert values["rotate_bytes_per_token"] == 2 * kv
    assert values["align_bytes_per_token"] == 2 * kv + 3 * 2 * (16 + 4)
    samples = json.loads(out.read_text())["samples"]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"copy": 2, "rotate": 2, "align": 2}
    rates = [2 * kernels.COPY_BYTES / seconds for seconds in samples["copy"]]
    shares = sorted(20 * (2 * kv + 120) / a / b for a, b in zip(samples["align"], rates, strict=True))
    assert shares[0] <= values["align_bandwidth"] <= shares[1]
