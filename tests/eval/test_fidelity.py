"""`python -m eval.fidelity`: its figures on a tiny team, and what it makes of outcomes, by hand."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from eval import fidelity
from kvcomm.engine.replay import Outcome

TEAM = """
name = "tiny"
[defaults]
sampling = { max_new_tokens = 24, ignore_eos = true }
[[agents]]
name = "first"
system = "You answer."
prompt = "Q: {question}"
[[agents]]
name = "second"
system = "You check what others say."
prompt = "Q: {question} A: {first}"
"""


def questions(file: Path, count: int, stem: str) -> Path:
    """Texts that share no beginning: what all texts have in common teaches an anchor bank only once."""
    texts = [hashlib.sha256(f"{stem} {index}".encode()).hexdigest()[:20] for index in range(count)]
    file.write_text("\n".join(json.dumps({"question": text}) for text in texts))
    return file


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "team.toml").write_text(TEAM)
    return [
        f"--model={tiny_folder}",
        f"--team={tmp_path / 'team.toml'}",
        f"--data={questions(tmp_path / 'train.jsonl', 12, 'How many are')}",
        f"--test={questions(tmp_path / 'test.jsonl', 3, 'Who has')}",
        f"--out={tmp_path / 'run.json'}",
        f"--answers={tmp_path / 'answers.jsonl'}",
        "--anchors=10",
        "--tests=3",
        "--json",
    ]


def test_figures(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main(arguments) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert len(samples) == len(fidelity.COMPARED)  # one agent has text to move
    mean = {name: sum(each) / 3 for name, each in samples.items()}
    assert values["token_over_rotate"] == pytest.approx(mean["second token"] / mean["second rotate"])
    assert values["rung25_over_rotate"] == pytest.approx(mean["second token 25% attention"] / mean["second rotate"])
    assert values["second paper"] == pytest.approx(mean["second paper"])


def test_answers_are_kept_and_taken_up_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main(arguments) == 0
    first = capsys.readouterr().out
    kept = (tmp_path / "answers.jsonl").read_text()
    assert len(kept.splitlines()) == 13
    assert fidelity.main(arguments) == 0
    assert (tmp_path / "answers.jsonl").read_text() == kept
    figures = [json.loads(text)["figures"] for text in (first, capsys.readouterr().out)]
    for one, other in zip(*figures, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-6)


def test_bound_figures_come_from_the_library(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, "--bound", "--calibration=2"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert values["accepted_005_requests"] == 0  # two pairs promise nothing at 0.05
    assert values["violations_005"] == 0


def outcome(divergence: float, recomputed: int = 0, distance: float = 0.3, residual: float | None = None) -> Outcome:
    return Outcome(divergence, 1.0, distance, residual, recomputed)


def test_a_bound_is_served_as_the_planner_would() -> None:
    calm = [(100, [outcome(0.03), outcome(0.01, 25, residual=0.1), outcome(0.0, 50, residual=0.1)])] * 40
    tested = {
        "a": [
            (100, [outcome(0.03), outcome(0.01, 25, residual=0.1), outcome(0.0, 50, residual=0.1)]),
            (100, [outcome(0.03), outcome(0.04, 25, residual=0.1), outcome(0.0, 50, residual=0.1)]),  # a violation
            (100, [outcome(0.0), outcome(0.0, 25, residual=0.9), outcome(0.0, 50, residual=0.1)]),  # escalates
            (100, [outcome(0.0, distance=0.9), outcome(0.0, 25), outcome(0.0, 50)]),  # too far off
        ]
    }
    figures = fidelity._bound_figures({"a": calm}, tested, [0, 1, 2], (0.02, 0.05))
    values = {figure.id: figure.value for figure in figures}
    assert values["accepted_002"] == 3 / 4
    assert values["violations_002"] == 1 / 3
    assert values["aligned_002"] == pytest.approx((75 + 75 + 50) / 300)
    assert values["violations_002_limit"] == pytest.approx(0.05 + 2 * math.sqrt(0.05 * 0.95 / 3))


def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, f"--data={tmp_path / 'missing.jsonl'}"]) == 1
    assert "missing.jsonl" in capsys.readouterr().err.splitlines()[-1]
