"""`kvcomm bench` on a tiny model: ids, JSON and tables, wrong input. Never how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli import app
from tests.tiny import tiny_model

COMMANDS = {
    "prefix": (
        ["--prefix-tokens=33", "--tail-tokens=5", "--repeats=2"],
        ["hit_speedup", "ttft_cold_s", "ttft_cached_s"],
    ),
    "decode": (
        ["--context-tokens=20", "--new-tokens=3", "--streams=3, 1", "--repeats=2"],
        ["decode_1_tokens_per_s", "decode_3_tokens_per_s", "step_1_ms", "step_3_ms"],
    ),
    "fork": (["--context-tokens=40", "--forks=4"], ["fork_ms", "fork_bytes"]),
    "restore": (
        ["--context-tokens=40", "--repeats=2"],
        ["restore_speedup", "recompute_s", "restore_s", "snapshot_bytes"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    made = tiny_model()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, command: str, *arguments: str) -> int:
    return app.run(["bench", command, "--model", str(folder), *arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_json(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, ids = COMMANDS[command]

    assert run(folder, command, *arguments, "--json") == 0

    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result.keys() == {"figures", "config"}
    assert [figure["id"] for figure in result["figures"]] == ids
    for figure in result["figures"]:
        assert figure.keys() == {"id", "value", "unit", "spread"}
        assert figure["value"] == 0 if figure["id"] == "fork_bytes" else figure["value"] > 0
        if figure["spread"] is not None:
            low, high = figure["spread"]
            assert low <= figure["value"] <= high
    config = result["config"]
    assert (config["model"], config["dtype"], config["attention"]) == (str(folder), "float32", "torch")


@pytest.mark.parametrize("command", COMMANDS)
def test_table(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, ids = COMMANDS[command]

    assert run(folder, command, *arguments) == 0

    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["figure", "median", "unit", "quartiles"]
    assert [row.split()[0] for row in rows] == ids


def test_streams_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "decode", *COMMANDS["decode"][0], "--json") == 0
    assert json.loads(capsys.readouterr().out)["config"]["streams"] == [1, 3]


@pytest.mark.parametrize("streams", ["0", "", "1,,2", "two", "-1", "1.5", "²"])
def test_wrong_streams(streams: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "decode", f"--streams={streams}") == 2
    assert "--streams takes positive numbers" in capsys.readouterr().err


def test_longer_than_the_model_can(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "fork", "--context-tokens=513") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "exceed the model's limit of 512" in err


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
