"""`python -m eval.overhead` on a tiny model: which figures there are and how they are printed. Never how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import overhead
from eval.figures import Figure

SIZES = ["--prefill-tokens=40", "--context-tokens=32", "--tail-tokens=5", "--new-tokens=4", "--streams=3"]
IDS = [
    "prefill_ratio",
    "decode_speedup_1",
    "decode_speedup_3",
    "hit_speedup",
    "prefill_stock_tokens_per_s",
    "prefill_engine_tokens_per_s",
    "decode_stock_tokens_per_s",
    "decode_engine_1_tokens_per_s",
    "decode_engine_3_tokens_per_s",
    "ttft_cold_s",
    "ttft_cached_s",
]


def run_json(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *arguments: str) -> Any:
    capsys.readouterr()
    assert overhead.main(["--model", str(folder), "--out", str(out), "--json", *SIZES, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"

    result = run_json(capsys, tiny_folder, out, "--repeats=2", "--seed=7")

    assert [figure["id"] for figure in result["figures"]] == IDS
    for figure in result["figures"]:
        low, high = figure["spread"]
        assert 0 < low <= figure["value"] <= high
    config = result["config"]
    assert (config["repeats"], config["seed"], config["streams"]) == (2, 7, 3)
    assert (config["dtype"], config["stock_attention"], config["prompts"]) == ("float32", "sdpa", "random tokens")
    assert isinstance(config["stock_prefill_use_cache"], bool)
    samples = json.loads(out.read_text())["samples"]
    assert {len(values) for values in samples.values()} == {2}


def test_ratios_are_those_of_the_samples(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recomputed from the raw seconds: the middle one of three ratios of neighbors."""
    out = tmp_path / "run.json"
    result = run_json(capsys, tiny_folder, out, "--repeats=3")
    values = {figure["id"]: figure["value"] for figure in result["figures"]}
    samples = json.loads(out.read_text())["samples"]

    for name, above, below in (
        ("prefill_ratio", "prefill_engine_s", "prefill_stock_s"),
        ("decode_speedup_1", "decode_stock_s", "decode_engine_1_s"),
        ("decode_speedup_3", "decode_stock_s", "decode_engine_3_s"),
        ("hit_speedup", "ttft_cold_s", "ttft_cached_s"),
    ):
        ratios = sorted(a / b for a, b in zip(samples[above], samples[below], strict=True))
        assert values[name] == pytest.approx(ratios[1])


def test_text_and_table(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "text.txt"
    data.write_text("You are a helpful agent. How many apples are left? " * 20)
    arguments = ["--model", str(tiny_folder), "--out", str(tmp_path / "run.json"), "--data", str(data), "--repeats=1"]

    assert overhead.main([*arguments, *SIZES]) == 0

    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].split() == ["figure", "value", "unit", "quartiles", "wanted"]
    assert [line.split()[0] for line in lines[2:]] == IDS
    assert "prefill of 40 tokens: pair 1 of 1" in err
    assert json.loads((tmp_path / "run.json").read_text())["config"]["prompts"] == "text"


def test_goals_are_the_defaults_figures() -> None:
    """Every figure with a goal exists when nothing is changed on the command line."""
    assert set(overhead.GOALS) == {"prefill_ratio", "decode_speedup_1", "decode_speedup_8", "hit_speedup"}
    assert Figure("hit_speedup", 1.0, "x").goal == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill-tokens=512"], "error: 512 prompt tokens and up to 1 new ones exceed the model's limit of 512"),
        (["--model=/nowhere/at/all"], "error: "),
        (["--data=/nowhere/at/all"], "error: "),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(tiny_folder), "--out", str(tmp_path / "run.json"), "--repeats=1", *SIZES]

    assert overhead.main([*common, *arguments]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(message)


def test_no_repeats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--repeats=0"])
    assert "--repeats" in capsys.readouterr().err
