"""Rows of a data set, written as `kvcomm tune` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import inputs
from kvcomm.agents.team import load_team
from kvcomm.agents.tuning.rows import read_rows


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def questions(subject: str, count: int, *, first: int = 0) -> list[dict[str, object]]:
    return [
        {"subject": subject, "question": f"{subject} {number}?", "choices": ["w", "x", "y", "z"], "answer": number % 4}
        for number in range(first, first + count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "mmlu" / "test_public.jsonl", [*questions("law", 4), *questions("art", 2)])
    write(tmp_path / "mmlu" / "dev_public.jsonl", questions("law", 5, first=50))
    write(tmp_path / "gsm8k" / "test_public.jsonl", [{"question": "What is asked?", "answer": "#### 1"}])
    write(tmp_path / "gsm8k" / "train_slice.jsonl", [{"question": "What is learned?", "answer": "#### 2"}])
    write(
        tmp_path / "humaneval" / "humaneval_public.jsonl",
        [{"prompt": "def one():\n", "entry_point": "one", "test": "assert one() == 1"}],
    )
    return tmp_path


@pytest.mark.parametrize("task", sorted(inputs.TASKS))
def test_rows_are_inputs_of_the_packaged_team(task: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "inputs.jsonl"
    for which in ([], ["--train"]):
        assert inputs.main([task, "--data", str(data), *which, "--out", str(out)]) == 0
        assert read_rows(out, load_team(task))


def test_rows_of_mmlu_are_inputs_of_its_team(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "inputs.jsonl"
    assert inputs.main(["mmlu", "--data", str(data), "--limit", "3", "--shots", "1", "--out", str(out)]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"].split("\n")[0] for row in written] == ["law 0?", "art 0?", "law 1?"]
    assert written[0]["examples"] == "law 50?\nA. w\nB. x\nC. y\nD. z\nAnswer: C"
    assert len(read_rows(out, load_team("mmlu"))) == 3


def test_another_seed_takes_other_rows(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "inputs.jsonl"
    taken = []
    for seed in ("1", "1", "2"):
        assert inputs.main(["mmlu", "--data", str(data), "--limit", "3", "--seed", seed, "--out", str(out)]) == 0
        taken.append(out.read_text())
    assert taken[0] == taken[1] != taken[2]


def test_rows_to_learn_from(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "inputs.jsonl"
    assert inputs.main(["gsm8k", "--data", str(data), "--train", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"question": "What is learned?"}


def test_rows_to_learn_from_never_come_from_elsewhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: beside a file with no others the hub was asked."""
    alone = tmp_path / "alone" / "test_public.jsonl"
    write(alone, questions("law", 2))
    out = tmp_path / "inputs.jsonl"
    assert inputs.main(["mmlu", "--data", str(alone), "--train", "--shots", "0", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2
    write(alone, [{"question": "What is asked?", "answer": "#### 1"}])
    assert inputs.main(["gsm8k", "--data", str(alone), "--train", "--out", str(out)]) == 1
    assert f"{alone} has no train* beside it; give --train FILE" in capsys.readouterr().err
    train = data / "gsm8k" / "train_slice.jsonl"
    assert inputs.main(["gsm8k", "--data", str(alone), "--train", str(train), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"question": "What is learned?"}


def test_rows_of_another_data_set_are_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a traceback."""
    file = data / "gsm8k" / "test_public.jsonl"
    assert inputs.main(["mmlu", "--data", str(file), "--out", str(tmp_path / "inputs.jsonl")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: row 1 of ")
    assert error.endswith("has no subject, choices; rows of mmlu need subject, question, choices, answer")


def test_what_cannot_be_read_or_written_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inputs.main(["mmlu", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "x.jsonl")]) == 1
    assert inputs.main(["mmlu", "--data", str(data), "--out", str(tmp_path / "none" / "x.jsonl")]) == 1
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: ")
    assert "no such file or folder" in first
    assert second.startswith("error: ")
    assert "x.jsonl" in second
