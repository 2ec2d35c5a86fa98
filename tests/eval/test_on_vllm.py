"""`eval.on_vllm` without vLLM: what it says then, how it goes elsewhere, and its figures by hand."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from eval import on_vllm
from eval.on_vllm_runs import Asked, Cost


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_where_there_is_no_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_vllm.main(["--quick"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "error: vLLM cannot be imported here" in told.err
    assert "scripts/setup-env --integration vllm" in told.err


def test_another_interpreter_gets_the_same_arguments(tmp_path: Path) -> None:
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\necho "$@" $VLLM_ENABLE_V1_MULTIPROCESSING > {seen}\nexit 3\n')
    python.chmod(0o755)
    for given in (["--python", str(python)], [f"--python={python}"]):
        assert on_vllm.main([*given, "--quick", "--json"]) == 3
        assert seen.read_text() == "-m eval.on_vllm --quick --json 0\n"


def test_an_interpreter_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_vllm.main(["--python", "/nowhere/python"]) == 1
    assert "--python /nowhere/python: No such file" in capsys.readouterr().err


def test_counts_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_vllm.main(["--storms", "0"])
    assert "--storms must be at least 1, not 0" in capsys.readouterr().err


def test_figures() -> None:
    costs = [
        {"cold": Cost(2.0, 4.0), "hit": Cost(0.25, 1.0), "tier": Cost(0.25, 1.0), "moved": Cost(0.5, 2.0, 100, 90)},
        {"cold": Cost(4.0, 4.0), "hit": Cost(0.5, 1.0), "tier": Cost(0.5, 1.0), "moved": Cost(1.0, 2.0, 100, 86)},
    ]
    found = {figure.id: figure.value for figure in on_vllm._costs(costs)}
    assert found["tier_over_cold"] == found["tier_over_cold_wall"] / 2 == 0.125
    assert (found["moved_over_cold"], found["tier_over_hit"], found["moved_share"]) == (0.25, 1.0, 0.86)
    same = {figure.id: figure for figure in on_vllm._same((1.0, 0.5, 3, 100, 4, 0.1))}
    assert same["violations"].value == 0.04
    assert same["violations"].goal == "<= 0.160"


def test_a_prompt_in_parts() -> None:
    asked = Asked(((None, (1, 2)), ("document", (3, 4, 5)), (None, (6,))))
    assert asked.token_ids == [1, 2, 3, 4, 5, 6]
    assert asked.params(answer="answer")["segments"] == [
        {"start": 0, "end": 2},
        {"start": 2, "end": 5, "slot": "document", "kind": "dynamic"},
        {"start": 5, "end": 6},
    ]
    assert [(segment.name, segment.token_ids) for segment in asked.segments] == list(asked.parts)
