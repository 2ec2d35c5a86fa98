"""`python -m eval.ttft --setting scaling`: sizes, curves, exponents, and room for all of it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.ttft import __main__ as ttft
from eval.ttft import scaling
from eval.ttft.scaling import power_law, team_sizes
from eval.ttft.team import num_prompt_tokens
from kvcomm import Engine, EngineConfig
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import random_tokens
from tests.tiny import TinyModel


def options(**changes: Any) -> Namespace:
    sizes = {"agents": 4, "prompt_tokens": 400, "role_tokens": 32, "question_tokens": 64, "warm": 1, "repeats": 1}
    return Namespace(**{**sizes, "data": None, **changes})


def test_exponent_of_a_power_law() -> None:
    sizes = [100, 250, 800, 8000]
    assert power_law(sizes, [3e-4 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert power_law(sizes, [0.2] * 4) == pytest.approx(0.0)


def test_outputs_fill_the_longest_prompt(tiny: TinyModel) -> None:
    with Engine(tiny.model, tiny.tokenizer) as engine:
        sizes = team_sizes(engine, options())
        assert 400 - 3 < num_prompt_tokens(engine, sizes, 3) <= 400
        assert team_sizes(engine, options(prompt_tokens=9999)) == team_sizes(engine, options(prompt_tokens=511))
        with pytest.raises(InvalidRequest, match=r"take \d+ of 100 tokens, which leaves none for 3 outputs"):
            team_sizes(engine, options(prompt_tokens=100))
        with pytest.raises(InvalidRequest, match="at least 3 agents, got --agents 2"):
            team_sizes(engine, options(agents=2))


def test_curves(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--agents=4", "--prompt-tokens=600", "--role-tokens=16", "--question-tokens=64", "--repeats=1"]
    arguments = [f"--model={tiny_folder}", "--setting=scaling", f"--out={tmp_path / 'run.json'}", "--json", *sizes]
    assert ttft.main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    figures = {figure["id"]: figure["value"] for figure in report["figures"]}
    rows = [dict(zip(report["grid"]["columns"], row, strict=True)) for row in report["grid"]["rows"]]
    assert "prompts of 600 tokens do not fit the model; the longest has 511" in printed.err
    assert [row["agent"] for row in rows] == ["1", "2", "3", "4", "all"]
    assert report["config"]["longest_prompt"] == rows[3]["prompt tokens"] <= 511
    assert figures["aligned"] == 1.0
    for way in ("dense", "exact", "kvcomm", "along"):
        seconds = [row[f"{way} s"] for row in rows]
        assert seconds[4] == pytest.approx(sum(seconds[:4]))
        assert figures[f"exponent_{way}"] == pytest.approx(
            power_law([row["prompt tokens"] for row in rows[1:4]], seconds[1:4])
        )
        assert figures[f"exponent_agents_{way}"] == pytest.approx(power_law([2, 3, 4], np.cumsum(seconds[:4])[1:]))
    assert figures["agent4_speedup"] == pytest.approx(rows[3]["dense/kvcomm"])
    assert figures["agent4_along"] == pytest.approx(rows[3]["dense/along"])
    assert figures["sum_speedup"] == pytest.approx(rows[4]["dense/kvcomm"])


def test_all_sources_are_there(tiny: TinyModel) -> None:
    """Sixteen agents read more than a pool of the usual size holds at full size: nothing is evicted that is moved."""
    tiny.model.config.max_position_embeddings = 8192
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=11_600)) as engine:
        chosen = options(agents=16, prompt_tokens=2048, role_tokens=128, question_tokens=128)
        report = scaling.measure(engine, random_tokens(engine), chosen)
    figures = {figure.id: figure.value for figure in report.figures}
    assert figures["aligned"] == 1.0
