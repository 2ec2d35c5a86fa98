"""`python -m eval.fidelity`: its figures on a tiny team, and what it makes of outcomes, by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest

from eval import fidelity
from eval.bound import Rungs, bound_figures
from eval.shift import shift_texts
from kvcomm.align.calibration import Calibration, Pair
from kvcomm.reuse.replay import Outcome

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
        f"--data={questions(tmp_path / 'train.jsonl', 21, 'How many are')}",
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
    assert len(samples) == len(fidelity.ESSENTIAL)  # one agent has text to move
    assert {name for name in samples if "influence" in name or "head" in name} == set()
    mean = {name: sum(each) / 3 for name, each in samples.items()}
    assert values["token_over_rotate"] == pytest.approx(mean["second token"] / mean["second rotate"])
    assert values["token_over_paper"] == pytest.approx(mean["second token"] / mean["second paper"])
    assert values["rung25_over_rotate"] == pytest.approx(mean["second token 25% attention"] / mean["second rotate"])
    assert values["rung50_over_rotate"] == pytest.approx(mean["second token 50% attention"] / mean["second rotate"])
    assert values["second paper"] == pytest.approx(mean["second paper"])


def test_other_selectors_on_request(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, "--selectors"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert len(samples) == len(fidelity.COMPARED)
    ratio = sum(samples["second token 25% head"]) / sum(samples["second rotate"])
    assert values["all token 25% head over rotate"] == pytest.approx(ratio)


def test_answers_are_kept_and_taken_up_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main(arguments) == 0
    first = capsys.readouterr().out
    kept = (tmp_path / "answers.jsonl").read_text()
    assert len(kept.splitlines()) == 21
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
    calm = Calibration(3, [Pair((0.03, 0.01, 0.0), 0.3, (None, 0.1, 0.1))] * 40)
    tested = {
        "a": [
            Rungs(100, [outcome(0.03), outcome(0.01, 25, residual=0.1), outcome(0.0, 50, residual=0.1)]),
            Rungs(100, [outcome(0.03), outcome(0.04, 25, residual=0.1), outcome(0.0, 50, residual=0.1)]),  # a violation
            Rungs(100, [outcome(0.0), outcome(0.0, 25, residual=0.9), outcome(0.0, 50, residual=0.1)]),  # escalates
            Rungs(100, [outcome(0.0, distance=0.9), outcome(0.0, 25), outcome(0.0, 50)]),  # too far off
        ]
    }
    figures = bound_figures(tested, {"a": calm}, (0.02, 0.05))
    values = {figure.id: figure.value for figure in figures}
    assert values["accepted_002"] == 3 / 4
    assert values["accepted_002_requests"] == 3
    assert values["violations_002"] == 1 / 3
    assert values["aligned_002"] == pytest.approx((75 + 75 + 50) / 300)
    assert figures[0].goal == f"<= {0.05 + 2 * math.sqrt(0.05 * 0.95 / 3):.3g}"


def test_other_texts_are_read_on_the_same_banks(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(b"\n".join(json.dumps({"prompt": f"def f{i}():"}).encode() for i in range(3))))
    assert fidelity.main([*arguments, "--calibration=2", "--shift", str(other), "--shift-texts=2"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert values["shift_requests"] == 2  # one agent of two has text to move
    assert values["shift_approximated"] == 0
    reasons = {name.removeprefix("shift reason ") for name in values if name.startswith("shift reason ")}
    assert reasons & {"uncalibrated", "out_of_distribution", "no_anchors"}


def test_texts_are_found_by_field_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"id": 1, "text": "x" * 5000}) + "\n" + json.dumps({"question": "why"}) + "\n")
    assert [len(text) for text in shift_texts([file], 5)] == [1200, 3]
    file.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="line 1 has none of the fields"):
        shift_texts([file], 5)


def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, f"--data={tmp_path / 'missing.jsonl'}"]) == 1
    assert "missing.jsonl" in capsys.readouterr().err.splitlines()[-1]
