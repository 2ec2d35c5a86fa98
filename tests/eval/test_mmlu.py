"""MMLU: what is asked, in which order, and how letters are read; and a run on a tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from eval import mmlu
from eval.tasks.mmlu import Mmlu


def row(subject: str, number: int) -> dict[str, object]:
    text = hashlib.sha256(f"{subject} {number}".encode()).hexdigest()[:16]
    return {"subject": subject, "question": text, "choices": ["w", "x", "y", "z"], "answer": number % 4}


def test_questions_carry_examples_of_their_subject() -> None:
    task = Mmlu([row("law", 0), row("art", 1), row("law", 2)], num_shots=1)
    asked = task.inputs(row("law", 3))
    assert asked["examples"] == f"{row('law', 0)['question']}\nA. w\nB. x\nC. y\nD. z\nAnswer: A"
    assert asked["question"].endswith("A. w\nB. x\nC. y\nD. z")
    assert task.inputs(row("chess", 0))["examples"] == "There are none for chess."


def test_subjects_take_turns() -> None:
    rows = [row("law", 0), row("law", 1), row("law", 2), row("art", 0)]
    assert [each["subject"] for each in Mmlu([]).arrange(rows)] == ["law", "art", "law", "law"]


@pytest.mark.parametrize(
    ("first", "text", "found", "right", "strict"),
    [
        ({"The": -0.1, "C": -3.0, "A": -4.0}, "The answer is C.", "C", True, True),
        ({"A": -0.5, "C": -1.0}, "A", "A", False, False),
        ({"C": -0.5}, "B or C", "C", True, False),
        ({"The": -0.1}, "", "", False, False),
    ],
)
def test_score(first: dict[str, float], text: str, found: str, right: bool, strict: bool) -> None:
    assert Mmlu([]).score(text, first, row("law", 2)) == (found, right, strict)


TEAM = """
name = "tiny"
[defaults]
sampling = { max_new_tokens = 12, ignore_eos = true }
[[agents]]
name = "first"
prompt = "E: {examples} Q: {question}"
[[agents]]
name = "last"
prompt = "{question} Which letter?"
"""


def test_a_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "mmlu"
    data.mkdir()
    (data / "dev_public.jsonl").write_text("".join(json.dumps(row("law", n)) + "\n" for n in range(100, 103)))
    (data / "test_public.jsonl").write_text(
        "".join(json.dumps(row(subject, n)) + "\n" for subject in ("law", "art") for n in range(12))
    )
    (tmp_path / "team.toml").write_text(TEAM)
    arguments = [f"--model={tiny_folder}", f"--team={tmp_path / 'team.toml'}", f"--data={tmp_path}", "--agents=2"]
    arguments += [f"--out={tmp_path / 'out'}", "--limit=4", "--anchors=10", "--calibration=4", "--divergence=2"]
    arguments += ["--modes=dense,kvcomm,rotate", "--confidence=0.5", "--max-divergence=50", "--samples=2", "--json"]
    assert mmlu.main(arguments) == 0
    figures = {each["id"]: each["value"] for each in json.loads(capsys.readouterr().out)["figures"]}
    assert {"accuracy_dense", "letter_flips", "letter_flips_rotate"} <= figures.keys()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {frozenset(each["by_group"]) for each in report["modes"]} == {frozenset({"law", "art"})}
    assert all(set(each["pass_at"]) == {"1", "2"} for each in report["modes"])
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "kvcomm.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert all(len(sample["answers"]["last"]["first"]) > 20 for sample in samples)
