"""`python -m eval.ttft`: a team in small sizes; what one run calibrates, the next one takes from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.stock import Stock
from eval.ttft import __main__ as ttft
from eval.ttft.along import compare, follow, follow_team, num_left, read_along
from eval.ttft.team import Sizes, Team, tokens_of
from kvcomm import Engine
from kvcomm.align.profile_file import READERS_FILE
from kvcomm.errors import InvalidRequest
from kvcomm.lab.timings import random_tokens
from kvcomm.reuse.cost import ReuseCost
from tests.tiny import TinyModel

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
        assert values["same_first_tokens"] == 1.0
        assert values["logprob_error"] < 1e-4
        assert 0 < values["left"] == values["computed_along"]
        assert abs(values["exact_hit_along_computed"] - values["computed_along"]) <= 1
        assert values["agent3_along"] == pytest.approx(values["dense_along_3_s"] / values["kvcomm_along_3_s"])
        assert values["along_over_exact_hit"] == pytest.approx(values["kvcomm_along_3_s"] / values["exact_hit_along_s"])
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


def test_along_only(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is taught or moved."""
    sizes = ["--agents=3", "--role-tokens=16", "--question-tokens=48", "--output-tokens=32", "--repeats=1"]
    arguments = [f"--model={tiny_folder}", f"--out={tmp_path / 'run.json'}", "--json", "--along-only", *sizes]
    assert ttft.main(arguments) == 0
    read = capsys.readouterr()
    names = {figure["id"] for figure in json.loads(read.out)["figures"]}
    assert "anchors" not in read.err
    assert {"agent3_along", "sum_along", "along_over_exact_hit", "same_first_tokens"} < names
    assert not names & {"agent3_speedup", "over_exact_hit", "computed"}
    assert ttft.main([*arguments, f"--anchors={tmp_path / 'anchors'}"]) == 1
    assert "--along-only calibrates nothing that --anchors could keep" in capsys.readouterr().err


def test_agents_follow_and_little_is_left(tiny: TinyModel) -> None:
    """With all the time they need, followers lack the last few tokens of an output and the text behind it."""
    with Engine(tiny.model, tiny.tokenizer) as engine:
        engine.scheduler._spare.num_rows = lambda *_: 96  # type: ignore[method-assign]
        team = Team(engine, random_tokens(engine), Sizes(3, 16, 48, 32))
        first, *followers = follow_team(team, 32)
        assert num_left(first.usage) == first.usage.computed_tokens
        for agent, completion in enumerate(followers, start=1):
            glue = len(team.prompt(agent, team.texts())[-1].token_ids)
            assert glue < num_left(completion.usage) <= glue + 32
            assert completion.usage.read_along_tokens > 0
        usage = follow(team, 32).usage
        assert glue < num_left(usage) <= glue + 32
        assert usage.prompt_tokens == len(tokens_of(team.prompt(2, team.texts())))
        engine.check_integrity()


def test_what_is_left_is_computed_and_the_token_is_transformers_own(tiny: TinyModel) -> None:
    with Engine(tiny.model, tiny.tokenizer) as engine:
        team = Team(engine, random_tokens(engine), Sizes(3, 16, 48, 40))
        team.restart()
        prompt = team.prompt(2, team.texts())
        tokens = tokens_of(prompt)
        served = read_along(engine, prompt, 21)
        assert num_left(served.usage) == 21
        assert served.usage.exact_tokens == 16
        stock = Stock(tiny.model)
        assert compare(stock, tokens, served).is_same
        assert compare(stock, tokens, served).error < 1e-4
        assert compare(stock, tokens[:-5], served).error > 1e-3
        with pytest.raises(InvalidRequest, match=f"of a prompt of {len(tokens)} tokens {len(tokens)} cannot be left"):
            read_along(engine, prompt, len(tokens))
        engine.check_integrity()
