"""The demo with a tiny model: its figures follow from its rows, and it notices when the two ways differ."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvcomm.agents.results import AgentResult, GroupResult
from kvcomm.engine.results import Usage
from tests.tiny import save_tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
AGENTS = ("solver", "analyst", "programmer", "inspector", "referee")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as `python scripts/demo.py` finds it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("demo")
    for name in ("demo", "demo_report"):
        del sys.modules[name]


@pytest.fixture
def report(demo: ModuleType) -> ModuleType:
    return sys.modules["demo_report"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}", "more": n} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def result(name: str, *, ttft_s: float, exact: int, text: str = "7", token_ids: tuple[int, ...] = (1,)) -> AgentResult:
    usage = Usage(100, exact, 0, 100 - exact, 5, queue_s=0.0, ttft_s=ttft_s, total_s=ttft_s + 2.0)
    return AgentResult(name, 1, text, token_ids, (), usage, "length", 0.0, 1.0)


def group(**results: AgentResult) -> GroupResult:
    return GroupResult((results,), ("b",), 1.0)


def test_json(
    demo: ModuleType, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--model", str(model_folder), "--data", str(data), "--questions", "2", "--max-new-tokens", "6"]
    assert demo.main([*options, "--json", str(out)]) == 0

    value = json.loads(out.read_text())
    assert value.keys() == {"figures", "config", "rows", "moved"}
    rows: list[dict[str, Any]] = value["rows"]
    assert {(row["question"], row["way"], row["agent"]) for row in rows} == {
        (question, way, agent) for question in (1, 2) for way in ("cold", "with reuse") for agent in AGENTS
    }
    cold, reuse = ([row for row in rows if row["way"] == way] for way in ("cold", "with reuse"))
    for one, other in zip(cold, reuse, strict=True):
        assert (one["text"], one["prompt_tokens"]) == (other["text"], other["prompt_tokens"])
        assert one["exact_tokens"] == 0
        assert one["reasons"] == {"cache_off": one["prompt_tokens"]}
        assert other["computed_tokens"] == other["prompt_tokens"] - other["exact_tokens"]
        if other["question"] == 2:
            assert other["exact_tokens"] > 0.5 * other["prompt_tokens"]  # its role prompt at least
    figures = {figure["id"]: figure["value"] for figure in value["figures"]}
    assert figures["ttft_ratio"] == pytest.approx(sum(r["ttft_s"] for r in cold) / sum(r["ttft_s"] for r in reuse))
    exact, prompt = (sum(row[key] for row in reuse) for key in ("exact_tokens", "prompt_tokens"))
    assert figures["exact_share"] == pytest.approx(exact / prompt)
    assert figures["equal_answers"] == 1
    assert value["config"]["num_questions"] == 2

    printed = capsys.readouterr().out
    assert f"Questions: 2 from {data}" in printed
    assert "All 10 prompts and answers are the same in both, token by token." in printed
    header = next(line for line in printed.splitlines() if line.startswith("agent "))
    for column in ("prompt tokens", "exact", "computed", "TTFT cold", "TTFT with reuse", "ratio", "tokens/s"):
        assert column in header
    table = printed[printed.index(header) :].splitlines()[1:7]
    assert [line.split()[0] for line in table] == [*AGENTS, "team"]


def test_table_and_figures(report: ModuleType) -> None:
    pairs = [
        report.Pair("#### 7", group(a=result("a", ttft_s=2, exact=0), b=result("b", ttft_s=2, exact=0)), warm)
        for warm in (
            group(a=result("a", ttft_s=2, exact=0), b=result("b", ttft_s=2, exact=0)),
            group(a=result("a", ttft_s=0.5, exact=60), b=result("b", ttft_s=0.3, exact=20, text="no, 1,007.0")),
        )
    ]
    a, b = report.summarize(pairs)
    assert (a.agent, a.prompt_tokens, a.exact_tokens, a.computed_tokens) == ("a", 100, 30, 70)
    assert (a.ttft_cold_s, a.ttft_reuse_s, a.ratio) == (2, 1.25, 1.6)
    assert b.tokens_per_s == pytest.approx(2)
    team = report.total([a, b])
    assert (team.prompt_tokens, team.exact_tokens, team.ttft_cold_s) == (200, 40, 4)
    assert team.ratio == pytest.approx(4 / 2.4)
    figures = {figure["id"]: figure for figure in report.figures(pairs)}
    assert figures["ttft_ratio"]["value"] == pytest.approx(4 / 2.4)
    assert figures["ttft_ratio"]["spread"] == pytest.approx([2.0, 4.0])  # quartiles of 1 and 5
    assert figures["ttft_ratio_from_question_2"]["value"] == pytest.approx(4 / 0.8)
    assert figures["ttft_ratio_a"]["value"] == 1.6
    assert figures["right_answers"]["value"] == 0.5


def test_different_answers_are_shouted(
    demo: ModuleType,
    report: ModuleType,
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer_all = demo.answer_all

    def altered(*arguments: Any) -> Any:
        pairs = answer_all(*arguments)
        wrong = replace(pairs[0].cold["referee"], token_ids=(1, 2, 3))
        return [pairs[0]._replace(cold=GroupResult(({**pairs[0].cold, "referee": wrong},), ("referee",), 1.0))]

    monkeypatch.setattr(demo, "answer_all", altered)
    options = ["--model", str(model_folder), "--data", str(data), "--questions", "1", "--max-new-tokens", "2"]
    assert demo.main(options) == 1
    assert "ONLY 4 OF 5 ANSWERS ARE THE SAME IN BOTH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "number"),
    [("a 3 b -4", -4), ("#### 1,250", 1250), ("2.50 dollars", 2.5), ("none", None), ("Answer: 18.", 18)],
)
def test_last_number(report: ModuleType, text: str, number: float | None) -> None:
    assert report.last_number(text) == number


def test_own_questions_without_data_and_hub(demo: ModuleType) -> None:
    questions, source = demo.choose_questions(None, 3)
    assert questions == list(demo.OWN_QUESTIONS)
    assert source == "written for this demo (GSM8K from the hub: HF_HUB_OFFLINE is set; see --data)"
    assert len(demo.choose_questions(None, 1)[0]) == 1


def test_own_questions_have_the_answers_they_say(demo: ModuleType, report: ModuleType) -> None:
    results = (45 + 2 * 45 - 38, (6 + 3) * 14, 8 * 12 + (11 - 8) * 12 * 1.5)
    assert [report.last_number(question.answer) for question in demo.OWN_QUESTIONS] == list(results)


def test_missing_datasets_package(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert demo.questions_from_hub(3) == ([], "the datasets package is not installed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', 'line 2: needs an object with the texts "question" and "answer"'),
        (b'{"question": "a"}\n', "line 1: needs"),
        (b'{"question": "a", "answer": 3}\n', "line 1: needs"),
        (b'{"question"\n', "line 1: not JSON"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_bad_data(
    demo: ModuleType, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    assert demo.main(["--data", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error


def test_wrong_options(demo: ModuleType, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--data", str(tmp_path / "nix")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert demo.main(["--questions", "0"]) == 2
    assert "--questions must be at least 1" in capsys.readouterr().err
    for warm in ("-3", "4"):
        assert demo.main(["--data", str(data), f"--warm={warm}"]) == 2
        assert f"--warm must be 0 or at least 5, not {warm}" in capsys.readouterr().err
    assert demo.main(["--data", str(data), "--json", str(tmp_path / "no" / "x")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert demo.main(["--data", str(data), "--model", "nix"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown model 'nix'")


def test_fewer_questions_than_asked_for(demo: ModuleType, data: Path) -> None:
    assert len(demo.read_questions(data, 9)) == 5


def test_interrupt(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, data: Path, model_folder: Path) -> None:
    def interrupt(result: AgentResult, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_finished_line", interrupt)
    assert demo.main(["--model", str(model_folder), "--data", str(data), "--max-new-tokens", "2"]) == 130
