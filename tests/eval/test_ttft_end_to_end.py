"""`python -m eval.ttft --setting end-to-end`: a small team on both sides, exact, read along and with moved KV."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from eval.stock import Stock
from eval.ttft import __main__ as ttft
from eval.ttft.end_to_end import WARM_UP_TOKENS, waiting_s
from kvcomm.agents.results import AgentResult
from kvcomm.align.calibration import Calibration
from kvcomm.align.profile_file import READERS_FILE
from kvcomm.engine.spare import Spare
from kvcomm.reuse.cost import ReuseCost

REFEREE = """
[[agents]]
name = "referee"
system = "Say who is right."
prompt = "{question}\\n\\nOne: {one}\\n\\nTwo: {two}\\n\\nWhat is the answer?"
"""
WORKERS = """
[[agents]]
name = "one"
system = "Work it out."
prompt = "{question}"
[[agents]]
name = "two"
system = "Look at it from another side."
prompt = "{question}"
"""
NUM_ANSWER_TOKENS = 12


def questions(folder: Path, count: int) -> Path:
    file = folder / "questions.jsonl"
    texts = [hashlib.sha256(str(index).encode()).hexdigest()[:32] for index in range(count)]
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    return file


def run(folder: Path, tmp_path: Path, *arguments: str) -> int:
    if not (tmp_path / "team.toml").exists():
        (tmp_path / "team.toml").write_text(WORKERS + REFEREE)
    return ttft.main(
        [
            f"--model={folder}",
            "--setting=end-to-end",
            f"--team={tmp_path / 'team.toml'}",
            f"--out={tmp_path / 'run.json'}",
            f"--answer-tokens={NUM_ANSWER_TOKENS}",
            "--json",
            *arguments,
        ]
    )


def figures_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    return {figure["id"]: figure["value"] for figure in report["figures"]} | {
        "config": report["config"],
        "notes": printed.err,
    }


def test_exact_and_along(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[int, ...]] = []
    generate = Stock.generate

    def spy(self: Stock, prompt: Any, *, num_rows: int, num_new_tokens: int) -> Any:
        if num_new_tokens != WARM_UP_TOKENS:
            assert (num_rows, num_new_tokens) == (1, NUM_ANSWER_TOKENS)
            prompts.append(tuple(prompt))
        return generate(self, prompt, num_rows=num_rows, num_new_tokens=num_new_tokens)

    monkeypatch.setattr(Stock, "generate", spy)
    (tmp_path / "team.toml").write_text(REFEREE + WORKERS)
    file = questions(tmp_path, 3)
    assert run(tiny_folder, tmp_path, f"--data={file}", "--repeats=3", "--in-flight=2") == 0
    found = figures_of(capsys)

    assert len(prompts) == len(set(prompts)) == 3 * 3
    # The referee comes last, wherever it stands in the team.
    assert all(len(prompts[at]) > max(len(prompts[at - 2]), len(prompts[at - 1])) for at in (2, 5, 8))
    assert found["same_prompts"] == found["same_answers"] == 1.0
    assert found["config"]["ways"] == ["exact", "along"]
    assert found["config"]["questions"] == "questions.jsonl"
    for way in ("exact", "along"):
        assert 0 < found[f"{way}_reused"] < 1
        assert found[f"{way}_moved"] == 0.0
    assert found["exact_computed_new"] > 0
    assert found["exact_read"] == 0.0
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    for way, name in (("exact", "end_to_end_speedup_exact"), ("along", "end_to_end_speedup")):
        ratios = [stock / own for stock, own in zip(samples[f"{way}_stock_s"], samples[f"{way}_s"], strict=True)]
        assert found[name] == pytest.approx(sorted(ratios)[1])
    (batched_s,) = samples["along_batched_s"]
    assert found["end_to_end_batched"] == pytest.approx(sum(samples["along_stock_s"][:2]) / batched_s)
    assert found["batched_per_question_s"] == pytest.approx(batched_s / 2)
    for side in ("exact", "exact_stock", "along", "along_stock"):
        for total, prefill in zip(samples[f"{side}_s"], samples[f"{side}_prefill_s"], strict=True):
            assert 0 < prefill < total
    ratios = [one / other for one, other in zip(samples["followed_token_s"], samples["alone_token_s"], strict=True)]
    assert found["follow_slowdown"] == pytest.approx(sorted(ratios)[1])
    assert 0 <= found["followed_read"] <= 1


def test_all_that_is_read_along_counts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no end of time beside answers the last agent reads nearly all of its prompt before it is complete."""
    monkeypatch.setattr(Spare, "num_rows", lambda *_: 96)
    assert run(tiny_folder, tmp_path, f"--data={questions(tmp_path, 2)}", "--repeats=2", "--in-flight=2") == 0
    found = figures_of(capsys)
    assert found["same_prompts"] == found["same_answers"] == 1.0
    assert found["along_computed_read_along"] > 0
    assert 0 < found["along_read"] < 1
    assert found["followed_read"] > 0


def test_moved_kv(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first run learns, the second one takes from the folder."""
    monkeypatch.setattr(Calibration, "distance_limit", 100.0)
    monkeypatch.setattr(ReuseCost, "is_worth_it", lambda self, *_: True)
    file, anchors = questions(tmp_path, 26), tmp_path / "anchors"
    bound = ["--max-divergence=50", "--confidence=0.5"]
    sizes = ["--warm=8", "--calibration=8", "--repeats=2", "--in-flight=2"]
    assert run(tiny_folder, tmp_path, f"--data={file}", f"--anchors={anchors}", *bound, *sizes) == 0
    first = figures_of(capsys)
    assert (anchors / READERS_FILE).exists()
    assert "learning from " in first["notes"]
    assert run(tiny_folder, tmp_path, f"--data={file}", f"--anchors={anchors}", *bound, *sizes) == 0
    again = figures_of(capsys)
    assert "readers taken from" in again["notes"]
    assert "learning from " not in again["notes"]
    for found in (first, again):
        assert min(found["moved_moved"], found["healed_moved"]) > 0 == found["along_moved"]
        assert found["moved_computed_glue"] > 0
        assert found["same_prompts"] == found["same_answers"] == 1.0
        assert found["config"]["ways"] == ["exact", "along", "moved", "healed"]
    names = json.loads((tmp_path / "run.json").read_text())["samples"].keys()
    assert {"exact_s", "along_s", "exact_stock_s", "moved_s", "moved_stock_s", "moved_batched_s"} <= names


def test_too_few_questions_and_too_many_at_once(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = questions(tmp_path, 3)
    assert run(tiny_folder, tmp_path, f"--data={file}", "--repeats=4") == 1
    assert "error: 3 questions are too few: 4 are measured, 0 warm up" in capsys.readouterr().err
    assert run(tiny_folder, tmp_path, f"--data={file}", "--repeats=2", f"--anchors={tmp_path / 'new'}") == 1
    assert "2 are measured, 32 warm up" in capsys.readouterr().err
    assert run(tiny_folder, tmp_path, f"--data={file}", "--repeats=2", "--in-flight=17") == 1
    assert "--in-flight 17 is more than the 16 runs that are made at once" in capsys.readouterr().err


def test_waiting_is_counted_once() -> None:
    def answer(start: float, ttft: float) -> AgentResult:
        return cast("AgentResult", SimpleNamespace(started_s=start, usage=SimpleNamespace(ttft_s=ttft)))

    together = [answer(0.0, 2.0), answer(0.0, 3.0), answer(1.0, 0.5)]
    assert waiting_s(together) == pytest.approx(3.0)
    assert waiting_s([*together, answer(10.0, 1.0), answer(10.5, 1.0)]) == pytest.approx(4.5)
    assert waiting_s([]) == 0.0
