"""`python -m eval.gsm8k` on a tiny model: every mode, its report, an interruption, and how answers are read."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from eval import gsm8k
from eval.tasks import command
from eval.tasks.gsm8k import Gsm8k, last_number
from eval.tasks.samples import SampleFile
from kvcomm.align.calibration import Calibration
from kvcomm.engine.cost import ReuseCost

TEAM = """
name = "tiny"
[defaults]
sampling = { max_new_tokens = 20, ignore_eos = true }
[[agents]]
name = "first"
system = "Work it out."
prompt = "{question}"
[[agents]]
name = "second"
system = "Look at what others found."
prompt = "{question}"
[[agents]]
name = "last"
system = "Say who is right."
prompt = "{question}\\n\\nWhat is the answer?"
"""
NUM_TRAIN = 18


def rows(stem: str, count: int) -> str:
    texts = [hashlib.sha256(f"{stem} {index}".encode()).hexdigest()[:24] for index in range(count)]
    return "".join(
        json.dumps({"question": text, "answer": f"so\n#### {index}"}) + "\n" for index, text in enumerate(texts)
    )


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    (data / "train_slice.jsonl.gz").write_bytes(gzip.compress(rows("train", NUM_TRAIN).encode()))
    (data / "test_public.jsonl").write_text(rows("test", 4))
    (tmp_path / "team.toml").write_text(TEAM)
    return [
        f"--model={tiny_folder}",
        f"--team={tmp_path / 'team.toml'}",
        f"--data={tmp_path / 'data'}",
        f"--out={tmp_path / 'out'}",
        "--agents=3",
        "--anchors=10",
        "--calibration=4",
        "--confidence=0.5",
        "--max-divergence=50",
        "--limit=4",
        "--divergence=3",
        "--json",
    ]


MODES = "dense,exact,kvcomm,paper,cacheblend,epic,rotate"


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four random texts say little about how far the next one is, and for a tiny model moving hardly pays."""
    monkeypatch.setattr(Calibration, "distance_limit", 100.0)
    monkeypatch.setattr(Calibration, "residual_limit", lambda self, rung: 100.0)
    monkeypatch.setattr(ReuseCost, "is_worth_it", lambda self, *_: True)


@pytest.mark.usefixtures("generous")
def test_every_mode(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main([*arguments, f"--modes={MODES}"]) == 0
    figures = {each["id"]: each["value"] for each in json.loads(capsys.readouterr().out)["figures"]}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    modes = {each["mode"]: each for each in report["modes"]}
    assert list(modes) == MODES.split(",")
    assert figures["flips_exact"] == 0
    assert modes["dense"]["tokens"]["exact"] == 0
    assert modes["exact"]["same"] == 1.0
    assert modes["exact"]["tokens"]["exact"] > 0
    for name in ("kvcomm", "paper", "cacheblend", "epic", "rotate"):
        assert modes[name]["tokens"]["aligned"] > 0, name
        assert len(modes[name]["divergences"]) == 3 * 2, name
        assert modes[name]["mean_divergence"] > 0, name
    assert modes["cacheblend"]["computed_share"] > modes["rotate"]["computed_share"]
    assert modes["kvcomm"]["violations"][0] == 0
    assert report["memory"]["anchor_bytes"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.findall(r'(?:src|href)="http|url\(http|@import', page)
    assert "flips_kvcomm" in (tmp_path / "out" / "report.md").read_text()


def test_all_modes_get_the_dense_prompts(arguments: list[str], tmp_path: Path) -> None:
    assert gsm8k.main([*arguments, "--modes=exact,rotate"]) == 0
    dense, rotate = (SampleFile(tmp_path / "out" / "samples" / f"{name}.jsonl").read() for name in ("dense", "rotate"))
    for index, sample in dense.items():
        answers = list(sample.answers.values())
        assert answers[0].token_ids in [token_ids for token_ids, _ in answers[2].prompt]
        for name, answer in sample.answers.items():
            assert rotate[index].answers[name].usage["prompt"] == sum(len(token_ids) for token_ids, _ in answer.prompt)


def test_an_interrupted_run_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "run_mode", interrupt)
        assert gsm8k.main([*arguments, "--modes=exact"]) == 130
    file = tmp_path / "out" / "samples" / "dense.jsonl"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])  # and the disk was not done either
    with monkeypatch.context() as patched:
        patched.setattr(command, "warm_up", interrupt)  # nothing is moved: nothing to warm up
        assert gsm8k.main([*arguments, "--modes=exact"]) == 0
    before, after = ([json.loads(line)["answers"] for line in text.splitlines()] for text in (whole, file.read_text()))
    assert [each["last"]["token_ids"] for each in before] == [each["last"]["token_ids"] for each in after]
    capsys.readouterr()
    assert gsm8k.main([*arguments, "--modes=exact", "--limit=2"]) == 1
    assert "holds a run with" in capsys.readouterr().err


def test_wrong_arguments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main([*arguments, "--modes=dense,magic"]) == 1
    assert "unknown mode 'magic'; there are dense, exact, kvcomm, paper" in capsys.readouterr().err
    assert gsm8k.main([*arguments, f"--data={tmp_path}"]) == 1
    assert "holds no gsm8k/test*.jsonl" in capsys.readouterr().err
    assert gsm8k.main([*arguments, "--calibration=100"]) == 1
    assert "18 rows to learn from are too few; 114 are needed" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{not json\n")
    assert gsm8k.main([*arguments, f"--data={bad}", "--modes=exact"]) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert error.count("\n") == 1


def test_without_data_and_network_one_line_says_what_to_do(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert gsm8k.main([each for each in arguments if not each.startswith("--data")]) == 1
    error = capsys.readouterr().err
    assert "openai/gsm8k cannot be fetched; give --data FILE or FOLDER" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 18", "18"),
        ("It is $1,200.50 in all.", "1200.5"),
        ("between 3 and 4.", "4"),
        ("-7 degrees", "-7"),
        ("18.0", "18"),
        ("1,2 and 3", "3"),
        ("half: .5", "0.5"),
        ("no idea", None),
    ],
)
def test_last_number(text: str, expected: str | None) -> None:
    assert last_number(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("answer", "right", "strict"),
    [
        ("So 9 * 2 = 18.\nAnswer: 18", True, True),
        ("Answer: $18.", True, True),
        ("answer: 18 apples", True, False),
        ("I think it is 18.", True, False),
        ("Answer: 18\nor 19", False, True),
        ("Answer: 81", False, False),
        ("", False, False),
    ],
)
def test_score(answer: str, right: bool, strict: bool) -> None:
    score = Gsm8k().score(answer, {}, {"answer": "9 * 2 = <<9*2=18>>18\n#### 18"})
    assert (score.is_right, score.is_strictly_right) == (right, strict)
