"""`kvcomm bench` on a tiny model: ids, JSON and tables, wrong input. Never how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli import app
from tests.tiny import save_tiny_model, tiny_model

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


TEAM = """
name = "two"
[defaults]
sampling = { ignore_eos = true }
[[agents]]
name = "first"
system = "You answer."
prompt = "Q: {question}"
[[agents]]
name = "second"
system = "You check what others say, word by word, and never trust them."
prompt = "Q: {question} A: {first}"
"""


@pytest.fixture(scope="module")
def reuse_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("reuse")
    (root / "team.toml").write_text(TEAM)
    lines = [f"What {index} makes of {index * 7919 % 1000} {chr(97 + index) * 9}?" for index in range(14)]
    (root / "texts.txt").write_text("\n".join(lines))
    model = save_tiny_model(root / "model")
    options = [f"--team={root / 'team.toml'}", f"--data={root / 'texts.txt'}", f"--model={model}"]
    return ["bench", "reuse", *options, "--runs=2", "--max-new-tokens=24", "--max-divergence=50", "--confidence=0.5"]


TTFT = ("ttft_dense_s", "ttft_exact_s", "ttft_along_s", "ttft_kvcomm_s", "ttft_healed_s")


def test_reuse_shows_every_agent_and_what_was_learned_can_be_kept(
    reuse_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*reuse_options, "--warm=12", f"--save={tmp_path / 'anchors'}", "--json"]) == 0
    agents = json.loads(capsys.readouterr().out)["agents"]
    assert [agent["agent"] for agent in agents] == ["first", "second"]
    for agent in agents:
        tokens = agent["exact_tokens"] + agent["aligned_tokens"] + agent["computed_tokens"]
        assert tokens == pytest.approx(agent["prompt_tokens"])
        assert {len(agent[name]) for name in TTFT} == {2}
        assert len(agent["read_along_tokens"]) == 2
        assert len(agent["audited"]) == len(agent["rungs"]) == len(agent["predicted"])
    assert app.run([*reuse_options, f"--load={tmp_path / 'anchors'}"]) == 0
    out = capsys.readouterr().out
    assert "The team's first tokens:" in out
    heads = [line.split("  ")[0] for line in out.splitlines() if line.startswith("agent")]
    assert len(heads) == 3
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("first ", "second "))] == [
        "first",
        "second",
    ] * 3
    assert "computed because" in out
    assert "template text between moved texts" in out
    assert "allowed: 50 in 50% of cases" in out


def test_reuse_names_what_is_missing(reuse_options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*reuse_options, "--warm=100"]) == 2
    assert "14 inputs are too few for --runs 2 and --warm 100" in capsys.readouterr().err
    assert app.run([*reuse_options, "--load=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
