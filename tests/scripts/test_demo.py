"""The demo with a tiny model: text moves, what is told follows from the rows, and it notices when exact ways differ."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from eval.picture import main as main_of_picture
from kvcomm.agents.comparison import AgentReuse, Results, Way
from kvcomm.agents.results import AgentResult, GroupResult
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.ladder import TURNED
from kvcomm.align.prior import Prior, write_prior
from kvcomm.align.standings import Level
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Usage
from kvcomm.reuse.plan import ApproximationReport, BoundInForce
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY
from tests.tiny import save_tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
AGENTS = ("solver", "analyst", "programmer", "inspector", "referee")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as `python scripts/demo.py` finds it, on a machine on which only computed tokens take time."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("kvcomm.reuse.parts.cached_cost", lambda *_: ROWS_ONLY)
    yield importlib.import_module("demo")
    for name in ("demo", "demo_report"):
        del sys.modules[name]


@pytest.fixture
def report(demo: ModuleType) -> ModuleType:
    return sys.modules["demo_report"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prior(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs each of prompts whose sources had read all, some or none, that say that moving does no harm."""
    with Engine.load(str(model_folder)) as engine:
        model = engine.prior_model
    measured = {rung: Measured(0.0, None if rung.share == 0 else 1.0) for rung in TURNED}
    pairs = tuple(Pair(measured, {}, Sources(2, 0, number % 3, 10)) for number in range(60))
    file = tmp_path_factory.mktemp("prior") / "prior.json"
    write_prior(Prior(model, {"any": pairs}), file, name="tiny")
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"{n} pears and {n + 3} plums lie here. How many are that?", "more": n} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_text_moves_from_the_first_question_on(
    demo: ModuleType, model_folder: Path, prior: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--model", str(model_folder), "--data", str(data), "--questions", "2", "--max-new-tokens", "6"]
    assert demo.main([*options, "--prior", str(prior), "--json", str(out)]) == 0

    value = json.loads(out.read_text())
    assert value.keys() == {"figures", "config", "rows", "moved", "summary"}
    rows: list[dict[str, Any]] = value["rows"]
    assert [(row["question"], row["way"], row["agent"]) for row in rows] == [
        (question, way, agent) for question in (1, 2) for way in Way for agent in AGENTS
    ]
    dense, exact, along, moved, healed = ([row for row in rows if row["way"] == way] for way in Way)
    for one, other, third in zip(dense, exact, along, strict=True):
        assert (one["text"], one["prompt_tokens"]) == (other["text"], other["prompt_tokens"])
        assert (one["text"], one["prompt_tokens"]) == (third["text"], third["prompt_tokens"])
        assert other["read_along_tokens"] == 0 <= third["read_along_tokens"] <= third["computed_tokens"]
        assert one["reasons"] == {"cache_off": one["prompt_tokens"]}
        assert other["exact_tokens"] > 0.5 * other["prompt_tokens"]  # its role prompt at least
        assert other["aligned_tokens"] == 0
    for row in [*moved, *healed]:
        assert (row["aligned_tokens"] > 0) == (row["agent"] != "solver") == (row["rung"] is not None)
        assert row["exact_tokens"] + row["aligned_tokens"] + row["computed_tokens"] == row["prompt_tokens"]

    figures = {figure["id"]: figure["value"] for figure in value["figures"]}
    seconds = [sum(row["ttft_s"] for row in way) for way in (dense, exact, moved)]
    assert figures["ttft_along_ratio"] == pytest.approx(seconds[0] / sum(row["ttft_s"] for row in along))
    read, done = (sum(row[key] for row in along) for key in ("read_along_tokens", "computed_tokens"))
    assert figures["read_share"] == pytest.approx(read / done)
    assert figures["ttft_ratio"] == pytest.approx(seconds[0] / seconds[1])
    assert figures["ttft_moved_ratio"] == pytest.approx(seconds[0] / seconds[2])
    assert figures["ttft_moved_over_exact"] == pytest.approx(seconds[1] / seconds[2])
    computed, prompt = (sum(row[key] for row in moved) for key in ("computed_tokens", "prompt_tokens"))
    assert figures["not_computed_share"] == pytest.approx(1 - computed / prompt)
    assert (figures["readers"], figures["readers_moving"], figures["prompts_moved"]) == (4, 4, 8)
    audited = [nats for agent in value["moved"] for nats in agent["audited"]]
    assert figures["prompts_audited"] == len(audited) == 8
    assert figures["violations"] == sum(nats > 0.05 for nats in audited)
    assert value["config"]["bound"] == {"max_divergence": 0.05, "confidence": 0.9}

    drawn = tmp_path / "first_tokens.svg"
    assert main_of_picture(["--from", str(out), "--out", str(drawn)]) == 0
    assert [agent for agent in AGENTS if f">{agent}<" in drawn.read_text()] == list(AGENTS)

    printed = capsys.readouterr().out
    assert f"Questions: 2 from {data}" in " ".join(printed.split())
    assert "all 10 prompts and answers are the same, token by token." in printed
    assert " ".join(value["summary"].split()) in " ".join(printed.split())
    assert "4 of 4 agents that read others moved text" in value["summary"]
    assert "by at least 20 measured prompts that ship with the model" in value["summary"]
    assert f"8 of 8 moved prompts were computed exactly as well: {sum(audited) / 8:.4f} nats" in value["summary"]


def test_without_a_prior_nothing_moves_and_that_is_said(
    demo: ModuleType, model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model_folder), "--data", str(data), "--questions", "1", "--max-new-tokens", "2"]
    assert demo.main(options) == 0
    printed = capsys.readouterr().out
    assert "Nothing was moved here; with exact prefixes alone" in printed
    said = "referee moved no text at 1 of 1 questions: too few measured prompts to promise the bound."
    assert said in " ".join(printed.split())


def test_packaged_questions_without_data(
    demo: ModuleType, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--model", str(model_folder), "--questions", "1", "--max-new-tokens", "2", "--json", str(out)]
    assert demo.main(options) == 0
    assert "Questions: 1 word problems that come with kvcomm" in capsys.readouterr().out
    assert json.loads(out.read_text())["config"]["num_questions"] == 1


def test_different_answers_are_shouted(
    demo: ModuleType,
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_all = demo.run_all

    def altered(*arguments: Any) -> Any:
        found = run_all(*arguments)
        dense = found.runs[0][Way.DENSE]
        wrong = {**dense, "referee": replace(dense["referee"], token_ids=(1, 2, 3))}
        runs = [{**found.runs[0], Way.DENSE: GroupResult((wrong,), ("referee",), 1.0)}]
        return replace(found, runs=runs)

    monkeypatch.setattr(demo, "run_all", altered)
    options = ["--model", str(model_folder), "--data", str(data), "--questions", "1", "--max-new-tokens", "2"]
    assert demo.main(options) == 1
    assert "ONLY 4 OF 5 ANSWERS ARE THE SAME" in capsys.readouterr().out


def test_interrupt(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, data: Path, model_folder: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_finished_line", interrupt)
    assert demo.main(["--model", str(model_folder), "--data", str(data), "--max-new-tokens", "2"]) == 130


# -- what is told -----------------------------------------------------------------------------------------------------


def result(
    name: str, *, ttft_s: float, exact: int = 0, moved: int = 0, read: int = 0, reasons: Mapping[str, int] = {}
) -> AgentResult:
    served = {} if not moved else {"approximation": ApproximationReport("r", "rotate", 0.0, 0.01, 0.0, None)}
    bound = BoundInForce(0.05, 0.1, Level.PRIOR if moved else None, 30 if moved else 0)
    computed = 100 - exact - moved
    usage = Usage(100, exact, moved, computed, 5, 0.0, ttft_s, ttft_s + 2.0, reasons, bound, **served)  # type: ignore[arg-type]
    usage = replace(usage, read_along_tokens=read)
    return AgentResult(name, 1, "7", (1,), (), usage, "length", 0.0, 1.0)


def one_run(dense_s: float, exact_s: float, moved_s: float, moved: int, reasons: Mapping[str, int] = {}) -> Results:
    def group(ttft_s: float, **counts: Any) -> GroupResult:
        answers = {"a": result("a", ttft_s=ttft_s, exact=60), "b": result("b", ttft_s=ttft_s, **counts)}
        return GroupResult((answers,), ("b",), 1.0)

    return {
        Way.DENSE: group(dense_s),
        Way.EXACT: group(exact_s, exact=20),
        Way.ALONG: group(exact_s / 2, exact=20, read=20),
        Way.MOVED: group(moved_s, exact=20, moved=moved, reasons=reasons),
        Way.HEALED: group(moved_s, exact=20, moved=moved, reasons=reasons),
    }


def report_of(report: ModuleType, *runs: Results, audited: list[float]) -> Any:
    agents = [AgentReuse(name) for name in ("a", "b")]
    for agent in agents:
        for run in runs:
            agent.usages.append(run[Way.MOVED][agent.agent].usage)
            agent.dense_s.append(run[Way.DENSE][agent.agent].usage.ttft_s)
            agent.exact_s.append(run[Way.EXACT][agent.agent].usage.ttft_s)
            agent.along_s.append(run[Way.ALONG][agent.agent].usage.ttft_s)
            agent.healed_s.append(run[Way.HEALED][agent.agent].usage.ttft_s)
    agents[1].audited += audited
    return report.Report(runs, agents, ReusePolicy(max_divergence=0.05, confidence=0.9))


def test_figures_and_summary(report: ModuleType) -> None:
    found = report_of(report, one_run(4, 2, 1, 70), one_run(8, 3, 1, 50), audited=[0.01, 0.07])
    figures = {figure["id"]: figure for figure in report.figures(found)}
    assert figures["ttft_cold_s"]["value"] == 12  # (8 + 16) / 2
    assert figures["ttft_moved_ratio"]["value"] == 6
    assert figures["ttft_moved_ratio"]["spread"] == pytest.approx((5, 7))  # quartiles of 4 and 8
    assert figures["ttft_moved_over_exact"]["value"] == 2.5
    assert figures["ttft_ratio"]["value"] == 2.4
    assert figures["ttft_along_ratio"]["value"] == 4.8
    assert figures["read_share"]["value"] == pytest.approx(40 / 240)
    assert figures["not_computed_share"]["value"] == pytest.approx((60 + 90 + 60 + 70) / 400)
    assert (figures["violations"]["value"], figures["prompts_audited"]["value"]) == (1, 2)
    assert report.summary(found) == (
        "On moved KV the first tokens of this team come 6.0 times as fast as without a cache and 2.5 times as fast as "
        "with exact prefixes alone: 1 of 1 agents that read others moved text into their prompts, and 70% of all "
        "prompt tokens were not computed. An answer was allowed to be off by 0.05 nats, and by more in 10% of cases "
        "(judged by at least 30 measured prompts that ship with the model); 2 of 2 moved prompts were computed exactly "
        "as well: 0.0400 nats on average, 1 above the bound. Read along, they come 4.8 times as fast as without a "
        "cache, with the same answers: 17% of what agents computed of their prompts was done while others answered."
    )


def test_an_audit_that_is_no_number_breaks_the_bound(report: ModuleType) -> None:
    found = report_of(report, one_run(4, 2, 1, 70), audited=[float("nan")])
    assert found.num_violations == 1


def test_what_was_not_moved_is_named_with_its_reason(report: ModuleType) -> None:
    stuck = one_run(4, 2, 1, 0, reasons={"glue": 40, "bound": 30, "new": 10})
    found = report_of(report, one_run(4, 2, 1, 70), stuck, audited=[0.01])
    assert report.notes(found)[-1] == "b moved no text at 1 of 2 questions: measured prompts broke the bound."
    assert "1 of 1 moved prompts were computed exactly" in report.summary(found)


@pytest.mark.parametrize("width", [30, 57, 58, 80, 140])
@pytest.mark.parametrize("letters", [False, True])
def test_the_picture_fits_and_reads_well_without_colors(report: ModuleType, width: int, letters: bool) -> None:
    found = report_of(report, one_run(4, 2, 1, 70), audited=[])
    symbols = report.LETTERS if letters else report.BLOCKS
    console = Console(width=width, record=True, no_color=True, file=sys.stderr)
    for line in report.picture(found, width, symbols):
        console.print(line, no_wrap=True)
    head, a, b, team = console.export_text().splitlines()
    assert all(len(line) <= width for line in (head, a, b, team))
    for symbol, name in zip(symbols, ("exact", "moved", "computed"), strict=True):
        assert f"{symbol} {name}" in head or width == 30
    assert [line.split()[0] for line in (a, b, team)] == ["a", "b", "team"]
    assert head.startswith("moved KV ")
    bar = b.split()[-1]
    assert (" 20 " in b and " 70 " in b and " 10 " in b) == (width >= 58)
    assert re.fullmatch(f"{re.escape(symbols.exact)}+{re.escape(symbols.moved)}+{re.escape(symbols.computed)}+", bar)
    assert bar.count(symbols.moved) == pytest.approx(0.7 * len(bar), abs=1)
    assert not letters or "".join((head, a, b, team)).isascii()


def test_what_was_read_along_has_a_picture_of_its_own(report: ModuleType) -> None:
    found = report_of(report, one_run(4, 2, 1, 70), audited=[])
    head, a, b, team = (line.plain for line in report.picture(found, 80, report.LETTERS, Way.ALONG))
    assert head.startswith("read along ")
    assert all(legend in head for legend in ("# exact", "= along", ". computed"))
    assert a.split()[1:4] == ["60", "0", "40"]
    assert b.split()[1:4] == ["20", "20", "60"]
    assert team.split()[1:4] == ["80", "20", "100"]


@pytest.mark.parametrize("width", [50, 78, 79, 120])
def test_the_table_fits(report: ModuleType, width: int) -> None:
    found = report_of(report, one_run(4, 2, 1, 70), one_run(8, 3, 1, 0), audited=[0.01])
    console = Console(width=width, record=True, no_color=True, file=sys.stderr)
    console.print(report.seconds_table(found, width))
    above, head, a, b, team = (line.split() for line in console.export_text().splitlines())
    more = width >= 79
    assert above == ["seconds", "to", "no", "exact", "read", "moved", "moved,"] + ["text", "nats", "nats"] * more
    assert (
        head
        == ["first", "token", "cache", "prefix", "along", "KV", "healed"] + ["moved", "expected", "measured"] * more
    )
    explained = " ".join(report.notes(found))
    pairs = zip(("no", "exact", "read", "moved", "moved,"), ("cache", "prefix", "along", "KV", "healed"), strict=True)
    assert all(f"{one} {other}: " in explained for one, other in pairs)
    assert a == ["a", "6.00", "2.50", "1.25", "1.00", "1.00"] + (["first"] if more else [])
    assert b == ["b", "6.00", "2.50", "1.25", "1.00", "1.00"] + (["1", "of", "2", "0.0100", "0.0100"] if more else [])
    assert team == ["team", "12.00", "5.00", "2.50", "2.00", "2.00"]


@example(counts=(1.0, 1.0, 1e-9), width=3)  # two that are rounded up left nothing of one of them
@given(
    counts=st.tuples(*[st.floats(0, 5000)] * 3).filter(lambda each: sum(each) > 0),
    width=st.integers(3, 200),
)
def test_bars_have_their_width_and_show_whatever_there_is(counts: tuple[float, float, float], width: int) -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        module = importlib.import_module("demo_report")
    finally:
        sys.path.remove(str(SCRIPTS))
    lengths = module.bar_lengths(module.Tokens(*counts), width)
    assert sum(lengths) == width
    for count, length in zip(counts, lengths, strict=True):
        assert (length > 0) == (count / sum(counts) > 0)
        assert (
            abs(length - width * count / sum(counts)) <= 2 + 1e-9
        )  # nothing is rounded away, so others may be two short


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"question": "a"}\n[1]\n', 'needs an object with the text "question" in every line'),
        (b'{"answer": "a"}\n', 'needs an object with the text "question"'),
        (b'{"question"\n', "line 1: not JSON"),
        (b"\xff\xfe\n", "needs an object"),
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
    assert error.count("\n") == 1


def test_wrong_options(
    demo: ModuleType,
    tmp_path: Path,
    data: Path,
    prior: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error_of(*options: str) -> tuple[int, str]:
        code = demo.main(options)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return code, error

    some = ("--data", str(data), "--model", str(model_folder))
    assert error_of("--data", str(tmp_path / "nix")) == (
        2,
        f"error: {tmp_path / 'nix'} cannot be read: No such file or directory\n",
    )
    assert error_of("--questions", "0") == (2, "error: --questions must be at least 1, not 0\n")
    assert "there is no folder" in error_of(*some, "--json", str(tmp_path / "no" / "x"))[1]
    assert error_of("--data", str(data), "--model", "nix")[1].startswith("error: unknown model 'nix'")
    assert "cannot be read" in error_of(*some, "--prior", str(tmp_path / "nix"))[1]
    other = json.loads(prior.read_text()) | {"model": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "this prior was measured on another model" in error_of(*some, "--prior", str(tmp_path / "other.json"))[1]
