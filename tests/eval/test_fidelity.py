"""`python -m eval.fidelity`: its figures on a tiny team, and what it makes of outcomes, by hand."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import fidelity, healed
from eval.bound import bound_figures
from eval.plans import best_plan, judge
from eval.replayed import Replayed, num_moved
from eval.shift import shift_texts
from eval.team_answers import Reading, in_order
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Measured, Pair
from kvcomm.align.ladder import Rung
from kvcomm.align.readers import Reader
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.reuse.decision import Rungs
from kvcomm.reuse.replay import Outcome
from kvcomm.reuse.reuse import Reuse
from tests.engine.conftest import ROWS_ONLY
from tests.tiny import tiny_model

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


def values_of(text: str) -> dict[str, float]:
    return {figure["id"]: figure["value"] for figure in json.loads(text)["figures"]}


def test_figures(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main(arguments) == 0
    values = values_of(capsys.readouterr().out)
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert len(samples) == len(fidelity.ESSENTIAL)  # one agent has text to move
    assert {name for name in samples if "influence" in name or "head" in name} == set()
    mean = {name: sum(each) / 3 for name, each in samples.items()}
    assert values["token_over_rotate"] == pytest.approx(mean["second token"] / mean["second rotate"])
    assert values["token_over_paper"] == pytest.approx(mean["second token"] / mean["second paper"])
    assert values["rung25_over_rotate"] == pytest.approx(mean["second token 25 % attention"] / mean["second rotate"])
    assert values["rung50_over_rotate"] == pytest.approx(mean["second token 50 % attention"] / mean["second rotate"])
    assert values["cacheblend25_over_rotate"] == pytest.approx(
        mean["second rotate 25 % deviation"] / mean["second rotate"]
    )
    assert values["second paper"] == pytest.approx(mean["second paper"])
    assert "best25_over_rotate" not in values  # no questions to choose it on


def test_other_selectors_on_request(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, "--selectors"]) == 0
    values = values_of(capsys.readouterr().out)
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert len(samples) == len(fidelity.ESSENTIAL) + len(fidelity.SELECTORS)
    ratio = sum(samples["second token 25 % head"]) / sum(samples["second rotate"])
    assert values["all token 25 % head over rotate"] == pytest.approx(ratio)


def test_an_interrupted_measurement_goes_on_where_it_was(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = [*arguments, "--bound", "--calibration=4"]
    assert fidelity.main(bounded) == 0
    whole, file = values_of(capsys.readouterr().out), tmp_path / "run.outcomes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 7  # 4 questions calibrate, 3 test
    file.write_text("".join(lines[:2]) + lines[2][:50])
    measure, asked = Reuse.measure, []
    monkeypatch.setattr(Reuse, "measure", lambda *args: asked.append(args) or measure(*args))
    assert fidelity.main(bounded) == 0
    assert len(asked) == 5
    again = values_of(capsys.readouterr().out)
    assert again.keys() == whole.keys()
    assert all(again[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6) for name in whole)

    monkeypatch.setattr(Reuse, "learn", None)  # with everything known nothing is taught
    assert fidelity.main(bounded) == 0
    assert len(asked) == 5


def test_what_was_measured_otherwise_does_not_count(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    assert fidelity.main([*arguments, f"--keep={file}"]) == 0
    assert len(file.read_text().splitlines()) == 3
    assert fidelity.main([*arguments, f"--keep={file}", "--anchors=9"]) == 0  # other banks
    assert len(file.read_text().splitlines()) == 6


def test_answers_are_kept_and_taken_up_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main(arguments) == 0
    first = capsys.readouterr().out
    kept = (tmp_path / "answers.jsonl").read_text()
    assert len(kept.splitlines()) == 13
    (tmp_path / "run.outcomes.jsonl").unlink()
    assert fidelity.main(arguments) == 0
    assert (tmp_path / "answers.jsonl").read_text() == kept
    figures = [json.loads(text)["figures"] for text in (first, capsys.readouterr().out)]
    for one, other in zip(*figures, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-6)


def test_bound_figures_come_from_the_library(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([*arguments, "--bound", "--calibration=2"]) == 0
    values = values_of(capsys.readouterr().out)
    assert values["accepted_005_requests"] == 0  # two pairs promise nothing at 0.05
    assert values["turned_accepted_005_requests"] == 0
    assert values["violations_005"] == 0
    assert 0 <= values["best25_over_rotate"] <= 1
    assert values["best25_computed"] <= 0.3


LADDER = (Rung("token", 0.5), Rung("token", 0.25), Rung("token"))


def outcome(divergence: float, recomputed: int = 0, distance: float = 0.3, residual: float | None = None) -> Outcome:
    return Outcome(divergence, 1.0, distance, residual, recomputed)


def test_a_bound_is_served_as_the_planner_would() -> None:
    measured = [Measured(0.0, 0.1), Measured(0.01, 0.1), Measured(0.03)]
    calm = Calibration(LADDER, [Pair(dict(zip(LADDER, measured, strict=True)), {"token": 0.3})] * 40)
    tested = {
        "a": [
            Rungs(100, [outcome(0.0, 50, residual=0.1), outcome(0.01, 25, residual=0.1), outcome(0.03)]),
            Rungs(100, [outcome(0.0, 50, residual=0.1), outcome(0.04, 25, residual=0.1), outcome(0.03)]),  # a violation
            Rungs(100, [outcome(0.0, 50, residual=0.1), outcome(0.0, 25, residual=0.9), outcome(0.0)]),  # escalates
            Rungs(100, [outcome(0.0, 50), outcome(0.0, 25, distance=0.9), outcome(0.0)]),  # too far off
        ]
    }
    figures = bound_figures(tested, {"a": calm}, Bound(0.02, 0.05))
    values = {figure.id: figure.value for figure in figures}
    assert values["accepted_002"] == 3 / 4
    assert values["accepted_002_requests"] == 3
    assert values["violations_002"] == 1 / 3
    assert values["aligned_002"] == pytest.approx((75 + 75 + 50) / 300)
    assert values["aligned_of_all_002"] == pytest.approx((75 + 75 + 50) / 400)
    assert figures[0].goal == f"<= {0.05 + 2 * math.sqrt(0.05 * 0.95 / 3):.3g}"


def replayed(agent: str, num_moved: int, divergences: dict[Rung, float]) -> Replayed:
    outcomes = {
        rung: Outcome(divergence, 1.0, 0.0, None, int(rung.share * num_moved))
        for rung, divergence in divergences.items()
    }
    return Replayed(agent, Reader(agent), num_moved, outcomes)


@given(st.data())
def test_no_plan_within_the_share_is_better_than_the_best(data: st.DataObject) -> None:
    rungs = [Rung("token", share) for share in (0.5, 0.25, 0.1, 0.0)]
    nats = st.floats(0, 1, width=16)
    agents = "abc"[: data.draw(st.integers(1, 3))]
    measured = {
        agent: [
            replayed(agent, data.draw(st.integers(10, 200)), {rung: data.draw(nats) for rung in rungs})
            for _ in range(data.draw(st.integers(1, 3)))
        ]
        for agent in agents
    }
    plans = [dict(zip(agents, chosen, strict=True)) for chosen in itertools.product(rungs, repeat=len(agents))]
    judged = [judge(measured, plan) for plan in plans]
    divergence, computed = judge(measured, best_plan(measured, rungs, 0.25))
    assert computed <= 0.25
    assert divergence == pytest.approx(min(nats for nats, share in judged if share <= 0.25))


def test_a_reader_sees_nothing_of_later_ones(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[tuple[Segment, ...]] = []
    context, measure = Engine.context, Reuse.measure

    def watched(engine: Engine, prompt: tuple[Segment, ...], **settings: Any) -> Context:
        published.append(tuple(prompt))
        return context(engine, prompt, **settings)

    def measured(reuse: Reuse, prompt: tuple[Segment, ...], *more: Any) -> object:
        assert [each[: len(prompt)] for each in published].count(tuple(prompt)) == 0
        return measure(reuse, prompt, *more)

    monkeypatch.setattr(Engine, "context", watched)
    monkeypatch.setattr(Reuse, "measure", measured)
    assert fidelity.main(arguments) == 0
    assert published


def test_text_without_a_source_does_not_count_as_moved() -> None:
    reading = Reading((Segment((1, 2)), Segment(tuple(range(100)), "question")), (5,))
    moved = {Rung("token", 0.25): outcome(0.0, 10), Rung("token", 0.5): outcome(0.0, 20), Rung("token"): outcome(0.1)}
    assert num_moved(reading, moved) == 41  # 20 is half of 40 or 41
    everything = {Rung("token", 0.3): outcome(0.0, 30), Rung("token", 0.5): outcome(0.0, 50)}
    assert num_moved(reading, everything) == 100


def test_other_texts_are_read_on_the_same_banks(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(b"\n".join(json.dumps({"prompt": f"def f{i}():"}).encode() for i in range(3))))
    assert fidelity.main([*arguments, "--calibration=2", "--shift", str(other), "--shift-texts=2"]) == 0
    values = values_of(capsys.readouterr().out)
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


def test_who_reads_others_comes_after_them() -> None:
    tiny = tiny_model()

    def reading(*slots: str) -> Reading:
        return Reading((Segment((1, 2)), *(Segment(tuple(range(5, 60)), slot) for slot in slots)), (7, 8))

    run = {"last": reading("q", "one", "two"), "one": reading("q"), "two": reading("q", "one")}
    with Engine(tiny.model, tiny.tokenizer) as engine:
        assert [name for name, _ in in_order(engine, run)] == ["two", "last"]  # the first of all has nothing to move
        ring = {"one": reading("two"), "two": reading("one")}
        assert [name for name, _ in in_order(engine, ring)] == ["two"]


def test_healing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured once, and kept: what healing leaves, and contexts that are exact."""
    assert fidelity.main([*arguments, "--heal"]) == 0
    told = capsys.readouterr().out
    values, file = values_of(told), tmp_path / "run.healed.jsonl"
    assert values["prompts"] == values["longer answers"] == 3
    assert 0 < values["heal4"] < values["heal8"] < 1
    assert values["healed within 4"] == pytest.approx(values["heal4"] * values["not healed"])
    assert values["heal_exact"] == 1
    assert values["heal_error"] < 1e-4
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert set(samples) == {"second not healed", "second healed within 4", "second healed within 8"}
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:40])
    assert fidelity.main([*arguments, "--heal"]) == 0
    assert len(file.read_text().splitlines()) == 3
    again = values_of(capsys.readouterr().out)
    assert again["heal4"] == pytest.approx(values["heal4"], rel=1e-3)


def test_healing_behind_the_answer_leaves_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healed, "RUNG", Rung("rotate"))
    monkeypatch.setattr(healed, "WITHIN", (1, 10, 30))
    tiny, text = tiny_model(), Segment(tuple(range(30, 90)), "question")
    with Engine(tiny.model, tiny.tokenizer) as engine:
        engine.reuse.parts.cost.model = ROWS_ONLY
        reader = (Segment((8, 9)), text, Segment((4,)))
        answer = engine.generate(reader, max_new_tokens=20, ignore_eos=True).token_ids
        engine.cache.clear()
        engine.generate((Segment((5, 6, 7)), text), max_new_tokens=1)
        measured = healed._measure(engine, "reader", Reading(reader, answer))
        assert measured is not None
        whole, one, half, behind = measured.nats
        assert 0 < one < half < whole
        assert behind == pytest.approx(whole, rel=1e-3)
        assert measured.num_tokens == 20
        assert len(measured.errors) == measured.num_contexts == 3
        assert max(measured.errors) < 1e-4
        engine.check_integrity()
        assert healed._measure(engine, "reader", Reading((Segment((8, 9)),), answer)) is None  # nothing to move
