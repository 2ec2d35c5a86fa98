"""MMLU: what is asked, in which order, and how letters are read; and a run on a tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import mmlu
from eval.tasks import work
from eval.tasks.mmlu import Mmlu
from eval.tasks.options import make_parser
from kvcomm.model.loading import load_model


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


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "mmlu"
    data.mkdir()
    (data / "dev_public.jsonl").write_text("".join(json.dumps(row("law", n)) + "\n" for n in range(100, 103)))
    (data / "test_public.jsonl").write_text(
        "".join(json.dumps(row(subject, n)) + "\n" for subject in ("law", "art") for n in range(12))
    )
    (tmp_path / "team.toml").write_text(TEAM)
    sizes = ["--agents=2", "--limit=4", "--anchors=10", "--calibration=4", "--divergence=2", "--timed=0"]
    files = [f"--team={tmp_path / 'team.toml'}", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]
    return [f"--model={tiny_folder}", *sizes, *files, "--confidence=0.5", "--max-divergence=50", "--json"]


def samples_of(tmp_path: Path, mode: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "samples" / f"{mode}.jsonl").read_text().splitlines()]


def test_a_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmlu.main([*arguments, "--modes=dense,kvcomm,rotate,stock", "--samples=2"]) == 0
    figures = {each["id"]: each["value"] for each in json.loads(capsys.readouterr().out)["figures"]}
    assert {"accuracy_dense", "text_accuracy_dense", "macro_dense", "text_macro_dense"} <= figures.keys()
    assert {"letter_flips", "letter_flips_rotate"} <= figures.keys()
    assert figures["letter_flips_stock"] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for mode in report["modes"]:
        outcome = mode["outcome"]
        assert set(outcome["by_group"]) == set(outcome["by_group_otherwise"]) == {"law", "art"}
        assert set(outcome["pass_at"]) == (set() if mode["mode"] == "stock" else {"1", "2"})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Right answers by subject" in page
    assert "Drawn answers" in page


def test_letters_are_looked_for_among_the_first_tokens(
    arguments: list[str], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every letter the log-probability that the stock forward gives it."""
    monkeypatch.setattr(work, "NUM_LOGPROBS", 100)
    assert mmlu.main([*arguments, "--modes=exact,stock"]) == 0
    loaded = load_model(tiny_folder)
    for sample in samples_of(tmp_path, "dense"):
        referee = sample["answers"]["last"]
        token_ids = [token for segment, _ in referee["prompt"] for token in segment]
        with torch.no_grad():
            logprobs = loaded.model(torch.tensor([token_ids])).logits[0, -1].float().log_softmax(-1)
        among = logprobs.topk(100).indices.tolist()
        wanted = {}
        for letter in "ABCD":
            spelled = [i for i in among if loaded.tokenizer.decode([i]).strip() == letter]
            if spelled:
                wanted[letter] = max(float(logprobs[i]) for i in spelled)
        assert referee["first"] == pytest.approx(wanted, abs=1e-4)
        for mode in ("exact", "stock"):
            (other,) = [each for each in samples_of(tmp_path, mode) if each["index"] == sample["index"]]
            assert other["answers"]["last"]["first"] == pytest.approx(wanted, abs=1e-4)


def test_examples_come_from_beside_a_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task_of(data: Path, *more: str) -> Mmlu:
        parser = make_parser("mmlu", 4, 0)
        mmlu.add_options(parser)
        return mmlu.make_task(parser.parse_args([*arguments, f"--data={data}", *more]))

    file = tmp_path / "mmlu" / "test_public.jsonl"
    for data in (tmp_path, tmp_path / "mmlu", file):
        assert task_of(data).inputs(row("law", 0))["examples"].count("Answer:") == 3
    assert task_of(file, "--shots=1").inputs(row("law", 0))["examples"].count("Answer:") == 1
    alone = tmp_path / "alone.jsonl"
    alone.write_text(file.read_text())
    capsys.readouterr()
    assert task_of(alone).inputs(row("law", 0))["examples"] == "There are none for law."
    assert "has no dev* beside it: no examples are shown" in capsys.readouterr().err
