"""`kvcomm bench serve` on a tiny model: its own server and a running one, every workload, wrong input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli import app
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.lab.load.test_trace_file import AGENTIC, MOONCAKE, write
from tests.server.live import serving
from tests.tiny import save_tiny_model, tiny_model

SIZES = ["--prefix-len=8", "--input-len=3", "--output-len=5", "--block-len=2", "--turns=2", "--branches=2"]


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}


def test_its_own_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "serve", f"--model={save_tiny_model(tmp_path)}", *SIZES, "--num-prompts=6", "--json"]
    assert app.run([*command, "--max-concurrency=3", "--overhead-pairs=2", "--stock-requests=3"]) == 0
    values = figures(capsys)
    assert (values["completed"], values["failed"], values["different_answers"]) == (6, 0, 0)
    assert values["outside_engine_ms"] > 0
    assert values["throughput_speedup"] == pytest.approx(
        values["output_throughput"] / values["stock_output_throughput"]
    )
    assert {"overhead_ms", "median_ttft_ms", "p99_tpot_ms", "mean_itl_ms"} <= values.keys()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    made = tiny_model()
    config = EngineConfig(page_size=4, pool_tokens=4096)
    with (
        Engine(made.model, made.tokenizer, config=config) as engine,
        serving(engine, ServerSettings(model="tiny", port=0)) as live,
    ):
        yield live.url


@pytest.mark.parametrize(
    ("name", "trace", "num_requests"),
    [
        ("shared-prefix", None, 7),
        ("multi-turn", None, 6),
        ("fan-out", None, 6),
        ("mooncake", MOONCAKE, 2),
        ("agentic", AGENTIC, 3),  # two of a session at most
    ],
)
def test_workloads(
    name: str, trace: Any, num_requests: int, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "serve", f"--url={url}", f"--dataset-name={name}", *SIZES, "--num-prompts=7"]
    if trace is not None:
        command.append(f"--dataset-path={write(tmp_path / 'trace.jsonl.gz', trace)}")
    assert app.run([*command, "--json"]) == 0
    values = figures(capsys)
    assert (values["completed"], values["failed"]) == (num_requests, 0)
    assert "overhead_ms" not in values  # there is no engine to compare a foreign server with
    assert app.run([*command, "--request-rate=1000"]) == 0
    assert "output_throughput" in capsys.readouterr().out


def test_teams(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "serve", f"--url={url}", *SIZES, "--num-prompts=4", "--dataset-name=teams", "--along-pairs=1"]
    assert app.run([*command, "--json"]) == 0
    values = figures(capsys)
    assert values["requests"] == 2 * 4
    assert {"along_load_cost", "along_team_speedup", "read_along_share"} <= values.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset-name=mooncake"], "--dataset-path goes with"),
        (["--dataset-path=x.jsonl"], "--dataset-path goes with"),
        (["--dataset-name=mooncake", "--dataset-path=/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
        (["--dataset-name=mooncake", "--dataset-path={agentic}"], "is a trace of the format agentic, not mooncake"),
        (["--dataset-name=fan-out", "--num-prompts=2"], "2 requests are too few"),
        (["--dataset-name=teams", "--num-prompts=2"], "2 requests are too few for one team"),
        (["--dataset-name=teams", "--request-rate=2"], "no --request-rate"),
        (["--dataset-name=teams", "--dataset-path=x.jsonl"], "no --dataset-path"),
        (["--url=nonsense"], "'nonsense' is no URL"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agentic = str(write(tmp_path / "trace.jsonl", AGENTIC))
    assert app.run(["bench", "serve", *(each.replace("{agentic}", agentic) for each in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_failures_are_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts longer than the model can take: every request fails, and why is said once."""
    assert app.run(["bench", "serve", f"--url={url}", "--num-prompts=3", "--prefix-len=2000", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {figure["id"]: figure["value"] for figure in result["figures"]}["failed"] == 3
    assert all(error.startswith("400: ") for error in result["errors"])
