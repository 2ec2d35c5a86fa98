"""`python -m eval.ttft --setting table`: cells, those that do not fit, and what every way really computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.stock import Stock
from eval.ttft import __main__ as ttft
from eval.ttft import first_tokens
from eval.ttft.along import num_left, read_along
from kvcomm import Engine
from kvcomm.engine.results import Completion

ROLE, QUESTION, OUTPUT = 32, 48, 64


def run(folder: Path, tmp_path: Path, *arguments: str) -> int:
    common = [f"--model={folder}", "--setting=table", f"--out={tmp_path / 'run.json'}", f"--question-tokens={QUESTION}"]
    return ttft.main([*common, "--warm=2", *arguments])


def test_cells(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--role-sizes=16,32", "--output-sizes=64,400"]
    assert run(tiny_folder, tmp_path, *sizes, "--repeats=2", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    figures = {figure["id"]: figure["value"] for figure in report["figures"]}
    assert report["config"]["left_out"] == ["16_400", "32_400"]
    assert "left out: roles of 16 and outputs of 400 tokens need" in printed.err
    assert figures["aligned"] == 1.0
    speedups = [figures["agent3_speedup_16_64"], figures["agent3_speedup_32_64"]]
    assert [figures["agent3_speedup_least"], figures["agent3_speedup_most"]] == sorted(speedups)

    rows = [dict(zip(report["grid"]["columns"], row, strict=True)) for row in report["grid"]["rows"]]
    assert [(row["role"], row["output"], row["agent"]) for row in rows] == [
        (role, "64", agent) for role in ("16", "32") for agent in ("1", "2", "3", "all")
    ]
    for row in rows:
        assert min(row["dense s"], row["exact s"], row["kvcomm s"], row["along s"]) > 0
    assert rows[1]["prompt tokens"] - rows[0]["prompt tokens"] > 64
    along = [figures["agent3_along_16_64"], figures["agent3_along_32_64"]]
    assert [figures["agent3_along_least"], figures["agent3_along_most"]] == sorted(along)
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    ratios = [d / k for d, k in zip(samples["16_64_dense_3_s"], samples["16_64_kvcomm_3_s"], strict=True)]
    assert figures["agent3_speedup_16_64"] == pytest.approx(sum(ratios) / 2)


def test_for_people(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_folder, tmp_path, "--role-sizes=16", "--output-sizes=64", "--repeats=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["role", "output", "agent", "prompt"]
    assert lines[1].split()[:3] == ["16", "64", "1"]
    assert any(line.startswith("agent3_speedup_16_64") for line in lines)


def test_every_way_computes_what_it_says(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact requests find their role in the cache and nothing else; moved ones compute glue only; prompts are equal."""
    served: list[tuple[bool, list[int], Completion]] = []
    along: list[Completion] = []
    dense: list[list[int]] = []
    reading: list[Engine] = []
    generate, prefill_s = Engine.generate, Stock.prefill_s

    def spy(self: Engine, prompt: Any, *arguments: Any, **settings: Any) -> Completion:
        completion = generate(self, prompt, *arguments, **settings)
        if "policy" in settings and not any(self is each for each in reading):
            tokens = [token for segment in prompt for token in segment.token_ids]
            served.append((settings.get("rung") is not None, tokens, completion))
        return completion

    def spy_along(engine: Engine, prompt: Any, num_tokens_left: int) -> Completion:
        reading.append(engine)
        along.append(read_along(engine, prompt, num_tokens_left))
        return along[-1]

    def spy_stock(self: Stock, prompt: Any, *, use_cache: bool) -> float:
        dense.append(list(prompt))
        return prefill_s(self, prompt, use_cache=use_cache)

    monkeypatch.setattr(Engine, "generate", spy)
    monkeypatch.setattr(Stock, "prefill_s", spy_stock)
    monkeypatch.setattr(first_tokens, "read_along", spy_along)
    assert run(tiny_folder, tmp_path, f"--role-sizes={ROLE}", f"--output-sizes={OUTPUT}", "--repeats=1") == 0

    served = served[-6:]  # before them: two agents that warm up
    assert [is_moved for is_moved, _, _ in served] == [True, False] * 3
    for agent, (moved, exact) in enumerate(zip(served[::2], served[1::2], strict=True)):
        assert moved[1] == exact[1] == dense[-3:][agent]
        assert exact[2].usage.exact_tokens == ROLE
        assert exact[2].usage.aligned_tokens == 0
        assert moved[2].usage.exact_tokens == ROLE
        slots = QUESTION + agent * OUTPUT
        assert moved[2].usage.aligned_tokens == (slots if agent else 0)
        assert exact[2].usage.computed_tokens - moved[2].usage.computed_tokens == (slots if agent else 0)
    (left,) = {num_left(completion.usage) for completion in along}
    assert left == json.loads((tmp_path / "run.json").read_text())["config"]["num_left"]
    for completion, prompt in zip(along[-2:], dense[-2:], strict=True):
        assert completion.usage.exact_tokens == ROLE
        assert completion.usage.read_along_tokens == len(prompt) - ROLE - left


def test_one_agent(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_folder, tmp_path, "--agents=1") == 1
    assert "--agents is at least 2, got 1" in capsys.readouterr().err


def test_nothing_fits(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_folder, tmp_path, "--role-sizes=600", "--output-sizes=64") == 1
    assert "error: no cell fits the model's 512 tokens; give smaller --role-sizes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--role-sizes=64,x", "'64,x' is no list of positive numbers"),
        ("--output-sizes=0", "'0' is no list of positive numbers"),
        ("--answer-tokens=3", "unrecognized arguments: --answer-tokens=3"),
        ("--setting=cube", "invalid choice: 'cube'"),
    ],
)
def test_wrong_options(argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, tmp_path, argument)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_is_small_and_a_given_size_counts(tiny_folder: Path, tmp_path: Path) -> None:
    assert run(tiny_folder, tmp_path, "--quick", "--role-sizes=16") == 0
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert config["role_sizes"] == [16]
    assert config["output_sizes"] == [64, 128]
    assert config["question_tokens"] == QUESTION
    assert config["repeats"] == 1
