"""`kvcomm tune`: from rows to a profile, and from a profile to what new rows say of it, on a tiny team."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvcomm.agents.tuning import read_profile, tuner
from kvcomm.agents.tuning.plan import Costs, least_sizes, make_plan
from kvcomm.agents.tuning.rows import Sizes
from kvcomm.cli.app import run
from kvcomm.cli.tune import seconds
from kvcomm.errors import AnchorFileError, InvalidRequest

TEAM = """
name = "tiny"
[defaults]
sampling = { max_new_tokens = 16, ignore_eos = true }
[[agents]]
name = "first"
system = "You answer."
prompt = "Q: {question}"
[[agents]]
name = "second"
system = "You check what others say."
prompt = "Q: {question} A: {first}"
"""
LOOSE = ("--max-divergence", "50", "--confidence", "0.7")

pytestmark = pytest.mark.usefixtures("home")


def questions(file: Path, count: int, stem: str) -> Path:
    """Texts that share no beginning."""
    texts = [hashlib.sha256(f"{stem} {index}".encode()).hexdigest()[:24] for index in range(count)]
    content = "\n".join(json.dumps({"question": text, "answer": "unused"}) for text in texts).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that take seconds."""
    monkeypatch.setattr("kvcomm.agents.tuning.plan.MOST", Sizes(6, 4, 4, 4))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "team.toml").write_text(TEAM)
    data = questions(tmp_path / "data.jsonl.gz", 24, "a")
    return ["--workload", str(tmp_path / "team.toml"), "--data", str(data), "--out", str(tmp_path / "p" / "tiny.toml")]


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run(["tune", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else json.loads(err.splitlines()[-1])["error"]["message"]


@pytest.mark.usefixtures("small")
def test_a_profile_is_made_checked_and_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path, other_model_folder: Path
) -> None:
    made = call(capsys, *arguments, *LOOSE, "--budget", "24h")
    file = tmp_path / "p" / "tiny.toml"
    profile = read_profile(file)
    assert made == {"profile": str(file), **profile.model_dump(mode="json")}
    parts = [profile.data.anchors, profile.data.tuning, profile.data.calibration, profile.data.verification]
    assert [len(part) for part in parts] == [6, 4, 4, 4]
    assert len(profile.data.used) == 18
    assert {*profile.ladders} == {*profile.verification} == {"token", "rotate"}
    for found in profile.verification.values():
        assert (found.requests, found.violations) == (4, 0)
    assert profile.verification["rotate"].accepted == 4  # corrected ones may be too far from the four calibrated
    assert profile.agents["second"].num_pairs == 4
    labels = {point.setting for point in profile.pareto}
    assert {"token", "rotate", "token 30 % attention", "token, k=4"} <= labels
    assert any(label.endswith("sketch_layers=2") for label in labels)
    assert profile.policy().bound == (50, pytest.approx(0.3))
    assert profile.policy().basis == "pool"

    team = tmp_path / "team.toml"
    fresh = questions(tmp_path / "fresh.jsonl", 5, "b")
    checked = call(capsys, "--check", str(file), "--data", str(fresh), "--workload", str(team))
    figures = {figure["id"]: figure for figure in checked["figures"]}
    assert figures["violations"]["value"] == 0
    assert figures["violations"]["spread"][0] == 0
    assert 0 < figures["violations"]["spread"][1] < 0.6
    assert figures["accepted"]["value"] >= 3  # a text further off than the four calibrated ones is not accepted
    assert checked["config"]["rows"] == 5
    assert checked["config"]["ladder"] == next(iter(profile.ladders))
    mixed = questions(tmp_path / "old.jsonl", 24, "a")
    assert call(capsys, "--check", str(file), "--data", str(mixed))["config"]["rows_left_out"] == 18
    many = questions(tmp_path / "many.jsonl", 20, "c")
    cut = call(capsys, "--check", str(file), "--data", str(many), "--budget", "0.001s")["config"]
    assert (cut["rows"], cut["rows_unread"]) == (8, 12)
    assert call(capsys, "--check", str(file), "--data", str(many))["config"]["rows"] == 20
    known = questions(tmp_path / "known.jsonl", 24, "a")
    used = [line for line in known.read_text().splitlines() if digest(line) in profile.data.used]
    known.write_text("\n".join(used))
    assert "all 18 rows were used" in call(capsys, "--check", str(file), "--data", str(known), code=2)

    asked = ["run", str(team), "--profile", str(file), "--no-read-along", "--json"]  # what is read along is not moved
    assert {*moving(capsys, asked, fresh)} == {"second"}
    assert run(["run", "gsm8k", "--input", "question=why so?", "--profile", str(file)]) == 1
    assert "another team" in capsys.readouterr().err

    other = ["--model", str(other_model_folder)]
    assert "another model" in call(capsys, "--check", str(file), "--data", str(fresh), *other, code=1)
    team.write_text(TEAM.replace("check", "doubt"))
    assert "another team" in call(capsys, "--check", str(file), "--data", str(fresh), code=1)
    team.write_text(TEAM)
    banks = tmp_path / "p" / "tiny" / "banks"
    bank = next(banks.glob("*.anchors.safetensors"))
    content = bank.read_bytes()
    bank.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = call(capsys, "--check", str(file), "--data", str(fresh), code=1)
    assert f"was altered; restore it, remove {banks} to go without banks, or tune anew" in message
    bank.unlink()
    assert "is missing" in call(capsys, "--check", str(file), "--data", str(fresh), code=1)
    file.write_text(file.read_text().replace("neighbors = ", "neighbours = "))
    with pytest.raises(AnchorFileError, match="neighbours"):
        read_profile(file)


def moving(capsys: pytest.CaptureFixture[str], command: list[str], file: Path) -> list[str]:
    """Agents that moved text, in a run for each question of `file`."""
    found: list[str] = []
    for line in file.read_text().splitlines():
        assert run([*command, "--input", f"question={json.loads(line)['question']}"]) == 0
        (answers,) = json.loads(capsys.readouterr().out)["rounds"]
        found += [name for name, answer in answers.items() if answer["usage"]["aligned_tokens"]]
    return found


@pytest.mark.usefixtures("small")
def test_a_profile_works_where_its_banks_are_not(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it ships: two small files, and text moves in the first run."""
    monkeypatch.setattr("kvcomm.agents.tuning.search.num_axes", lambda num_groups: 0)
    call(capsys, *arguments, *LOOSE, "--budget", "24h")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("tiny.toml", "tiny.pairs.json"):
        shutil.copy(tmp_path / "p" / name, shipped / name)
    file, team = shipped / "tiny.toml", tmp_path / "team.toml"
    asked = ["run", str(team), "--profile", str(file), "--no-read-along", "--json"]  # what is read along is not moved
    fresh = questions(tmp_path / "fresh.jsonl", 5, "b")
    assert moving(capsys, asked, fresh) == ["second"] * 5
    checked = call(capsys, "--check", str(file), "--data", str(fresh), "--workload", str(team))
    assert checked["config"]["ladder"] == "rotate"
    assert {figure["id"]: figure["value"] for figure in checked["figures"]}["accepted"] == 5

    pairs = shipped / "tiny.pairs.json"
    content = pairs.read_bytes()
    pairs.write_bytes(content.replace(b'"residual":', b'"residual": ', 1))
    assert run([*asked, "--input", "question=why so?"]) == 1
    assert f"{pairs} was altered, or belongs to another profile" in capsys.readouterr().err
    pairs.unlink()
    assert run([*asked, "--input", "question=why so?"]) == 1
    assert "copy it beside tiny.toml, or tune anew" in capsys.readouterr().err
    file.write_text(file.read_text().replace("format = 2", "format = 1", 1))
    assert run([*asked, "--input", "question=why so?"]) == 1
    assert "has format 1, whose calibration belonged to tuples of edges; tune anew" in capsys.readouterr().err


def digest(line: str) -> str:
    inputs = {"question": json.loads(line)["question"]}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("step", ["learn", "measure", "_calibrate", "_verify", "write_pairs", "write_profile"])
def test_an_interrupted_run_goes_on(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    step: str,
) -> None:
    monkeypatch.setattr("kvcomm.agents.tuning.search.num_axes", lambda num_groups: 0)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuner, step, interrupted)
        assert run(["tune", *arguments, *LOOSE, "--budget", "24h"]) == 130
    capsys.readouterr()
    answers = tmp_path / "p" / "tiny" / "answers.jsonl"
    before = answers.read_bytes()
    made = call(capsys, *arguments, *LOOSE, "--budget", "24h")
    assert answers.read_bytes() == before
    assert made["agents"]["second"]["num_pairs"] == 4
    assert made["verification"]["rotate"]["accepted"] == 4
    assert "another bound" in call(capsys, *arguments, "--budget", "24h", code=2)


@pytest.mark.usefixtures("small")
def test_a_dry_run_stops_and_too_little_of_anything_is_an_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    plan = call(capsys, *arguments, *LOOSE, "--budget", "24h", "--dry-run")
    assert [step["rows"] for step in plan["steps"]] == [16, 2, 6, 4, 4, 4, 4]
    assert 0 < plan["total_s"] <= 24 * 3600
    assert not (tmp_path / "p" / "tiny.toml").exists()
    few = call(capsys, *arguments, "--budget", "24h", "--out", str(tmp_path / "q.toml"), code=2)
    assert "24 rows are too few: confidence 0.95 needs 19 to calibrate" in few
    small = call(capsys, *arguments, *LOOSE, "--budget", "0.001s", "--out", str(tmp_path / "r.toml"), code=2)
    assert "a budget of 0 s is too small: confidence 0.7 needs" in small
    assert "above 0" in call(capsys, *arguments, "--max-divergence", "0", code=2)
    assert "either --out, to tune, or --check" in call(capsys, "--data", arguments[3], code=2)


@pytest.mark.usefixtures("small")
def test_costs_cut_short_are_measured_again_and_damaged_ones_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    """Bug: what an interrupted write had left of them ended in a traceback."""
    asked = (*arguments, *LOOSE, "--budget", "24h", "--dry-run")
    call(capsys, *asked)
    file = tmp_path / "p" / "tiny" / "costs.json"
    file.write_text(file.read_text()[:10])
    assert call(capsys, *asked)["total_s"] > 0
    for damaged in ("no costs", '{"rows": 3}', "3"):
        file.write_text(damaged + "\n")
        assert f"{file} is damaged" in call(capsys, *asked, code=2)


def test_a_folder_that_cannot_be_made_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no folder")
    out = tmp_path / "text" / "tiny.toml"
    message = call(capsys, *arguments, *LOOSE, "--budget", "24h", "--out", str(out), code=1)
    assert "cannot be written or read" in message
    assert str(tmp_path / "text") in message


def test_times() -> None:
    assert [seconds(text) for text in ("90", "90s", "20m", "1.5h")] == [90, 90, 1200, 5400]
    with pytest.raises(InvalidRequest, match="not a time"):
        seconds("soon")


def test_a_larger_budget_buys_larger_parts() -> None:
    costs = Costs(answer=2.0, learn=0.5, publish=0.5, replay=0.1)
    small, large = make_plan(costs, 1000, 400, 0.05, 1), make_plan(costs, 1000, 2000, 0.05, 1)
    assert small.sizes.calibration >= 19
    assert all(low <= high for low, high in zip(small.sizes, large.sizes, strict=True))
    assert small.total_s <= 400
    with pytest.raises(InvalidRequest, match="a budget of 100 s is too small"):
        make_plan(costs, 1000, 100, 0.05, 1)


def test_many_readers_need_fewer_rows_to_be_judged() -> None:
    """Requests are judged, and every row makes one for each reader; each reader has to be calibrated all the same."""
    assert least_sizes(0.05, 1) == Sizes(4, 4, 19, 19)
    assert least_sizes(0.05, 4) == Sizes(4, 4, 19, 10)


def test_what_the_sample_took_is_part_of_the_budget_and_its_answers_are_not_made_again() -> None:
    before = Costs(answer=2.0, learn=0.5, publish=0.5, replay=0.1)
    sampled = before._replace(sample=40.0, num_answered=16)
    one, other = (make_plan(costs, least_sizes(0.05, 4).total, 400, 0.05, 4) for costs in (before, sampled))
    assert (one.sizes, other.num_answered) == (other.sizes, 16)
    assert other.answer_s == one.answer_s - 16 * 2.0
    assert sum(rows for name, rows, _ in other.steps() if name in ("costs of a row", "exact runs")) == other.sizes.total
    spent, saved = 40.0, 32.0
    assert other.total_s - other.search_s == pytest.approx(one.total_s - one.search_s + spent - saved)
