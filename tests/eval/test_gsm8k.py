"""`python -m eval.gsm8k` on a tiny model: every mode, its report, interruptions, and how answers are read."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from eval import gsm8k
from eval.sandbox import NONE, isolation
from eval.tasks import answering, replays, serving, teaching, timing
from eval.tasks.gsm8k import Gsm8k, last_number
from eval.tasks.options import make_parser, make_work
from eval.tasks.samples import Sample, SampleFile
from kvcomm import Engine, EngineConfig
from kvcomm.align.calibration import Calibration
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.cost import ReuseCost

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
NUM_TRAIN = 14


def rows(stem: str, count: int) -> str:
    """Texts that begin with letters of their own: no two share a prefix."""
    texts = [chr(65 + index) + hashlib.sha256(f"{stem} {index}".encode()).hexdigest()[:24] for index in range(count)]
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
        "--timed=2",
        "--json",
    ]


MODES = "dense,exact,along,kvcomm,paper,cacheblend,epic,rotate,stock,stock_prefix"
MOVING = ("kvcomm", "paper", "cacheblend", "epic", "rotate")


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return {each["id"]: each["value"] for each in json.loads(capsys.readouterr().out)["figures"]}


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four random texts say little about how far the next one is, and for a tiny model moving hardly pays."""
    monkeypatch.setattr(Calibration, "distance_limit", 100.0)
    monkeypatch.setattr(Calibration, "residual_limit", lambda self, rung: 100.0)
    monkeypatch.setattr(ReuseCost, "is_worth_it", lambda self, *_: True)


@pytest.mark.usefixtures("generous")
def test_every_mode(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main([*arguments, f"--modes={MODES}"]) == 0
    found = figures(capsys)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    modes = {each["mode"]: each for each in report["modes"]}
    assert list(modes) == MODES.split(",")
    for name in ("exact", "along", "stock", "stock_prefix"):
        assert found[f"flips_{name}"] == 0, name
        assert modes[name]["damage"]["same"] == 1.0, name
        assert modes[name]["damage"]["mean_divergence"] < 1e-6, name
    assert modes["dense"]["reuse"]["tokens"]["exact"] == 0
    assert modes["stock"]["reuse"]["tokens"] == modes["dense"]["reuse"]["tokens"]
    for name in ("exact", "along", "stock_prefix"):
        assert modes[name]["reuse"]["tokens"]["exact"] > 0, name
    for name in MOVING:
        reuse, damage = modes[name]["reuse"], modes[name]["damage"]
        assert reuse["tokens"]["aligned"] > 0, name
        assert reuse["requests"]["moved"] == sum(reuse["rungs"].values()) == 4 * 2, name
        assert len(damage["divergences"]) == 3 * 2, name
        assert damage["mean_divergence"] > 1e-6, name
        assert len(damage["key_errors"]) == 2, name
        assert len(damage["by_position"]) == 20, name
        assert damage["key_errors"][0] == pytest.approx(0, abs=1e-5), name
    assert modes["cacheblend"]["reuse"]["computed_share"] > modes["rotate"]["reuse"]["computed_share"]
    assert modes["kvcomm"]["damage"]["num_audited"] == 3 * 2
    assert modes["kvcomm"]["damage"]["violations"][0] == 0
    assert len(modes["kvcomm"]["damage"]["reliability"]) == 6
    assert found["violations"] == 0


@pytest.mark.usefixtures("generous")
def test_healing_has_a_run_of_its_own(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said about divergences: what moved KV does before it is healed is not what the answer is."""
    assert gsm8k.main([*arguments, "--modes=heal,along"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (heal,) = (each for each in report["modes"] if each["mode"] == "heal")
    assert heal["reuse"]["tokens"]["aligned"] > 0
    assert heal["damage"]["divergences"] == []
    capsys.readouterr()
    assert gsm8k.main([*arguments, "--modes=kvcomm,heal,exact"]) == 1
    error = capsys.readouterr().err
    assert "heal leaves exact KV where kvcomm moves it; run --modes dense,kvcomm,exact and then --modes heal" in error


@pytest.mark.usefixtures("generous")
def test_the_report_is_complete(arguments: list[str], tmp_path: Path) -> None:
    assert gsm8k.main([*arguments, "--modes=dense,kvcomm,paper,stock_prefix"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = report["facts"]
    assert facts["environment"]["packages"]["transformers"]
    assert facts["environment"]["packages"]["datasets"]
    assert set(facts["seeds"]) == {"questions", "drawn_answers"}
    digests = [
        facts["digests"][name] for name in ("rows", "train_rows", "data_file", "team", "prompts", "chat_template")
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert facts["engine"]["page_size"] == 16
    assert facts["modes"]["kvcomm"]["max_divergence"] == 50
    assert facts["modes"]["paper"]["estimator"] == "paper"
    for mode in report["modes"]:
        times = mode["times"]
        assert list(times["ttft_s"]) == list(times["total_s"]) == ["first", "second", "last"]
        assert 0 < times["team_ttft_s"] < times["team_s"]
        assert times["kv_bytes"] > 0
        assert (times["anchor_bytes"] > 0) == (mode["mode"] in MOVING), mode["mode"]
    page, summary = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert page.count("<svg") == 8
    assert "#010203" not in page
    assert not re.findall(r'(?:src|href)="http|url\(http|@import', page)
    for title in ("Answers", "Divergence", "The bound", "Reuse", "First tokens", "Whole answers", "Memory"):
        assert f"<h2>{title}</h2>" in page
        assert f"## {title}\n" in summary
    assert "flips_kvcomm" in summary


def test_all_modes_get_the_dense_prompts(arguments: list[str], tmp_path: Path) -> None:
    assert gsm8k.main([*arguments, "--modes=exact,rotate,stock"]) == 0
    samples = {name: read(tmp_path, name) for name in ("dense", "exact", "rotate", "stock")}
    for index, sample in samples["dense"].items():
        answers = list(sample.answers.values())
        assert answers[0].token_ids in [token_ids for token_ids, _ in answers[2].prompt]
        for name, answer in sample.answers.items():
            asked = sum(len(token_ids) for token_ids, _ in answer.prompt)
            assert {samples[mode][index].answers[name].usage["prompt"] for mode in samples} == {asked}


@pytest.mark.usefixtures("generous")
@pytest.mark.parametrize(("together", "name"), [("kvcomm,paper,epic,rotate", "epic"), ("exact,rotate", "exact")])
def test_modes_served_together_are_as_if_alone(together: str, name: str, arguments: list[str], tmp_path: Path) -> None:
    """The same tokens from the same sources, whatever other modes left behind."""
    assert gsm8k.main([*arguments, f"--modes={together}"]) == 0
    assert gsm8k.main([*arguments, f"--modes={name}", f"--out={tmp_path / 'alone'}"]) == 0
    found = read(tmp_path, name)
    for index, sample in SampleFile(tmp_path / "alone" / "samples" / f"{name}.jsonl").by_index().items():
        for agent, answer in sample.answers.items():
            other = found[index].answers[agent]
            assert answer.token_ids == other.token_ids
            assert {**answer.usage, "moved": None} == {**other.usage, "moved": None}


def test_questions_served_at_the_same_time_have_room(arguments: list[str], tmp_path: Path) -> None:
    """What a question takes is known before it is answered, and no more are begun than the pool has room for."""
    assert gsm8k.main([*arguments, "--modes=rotate"]) == 0
    options = make_parser("gsm8k", 4, 0).parse_args(arguments)
    work = make_work(Gsm8k(), options, learns=False)
    with Engine.load(options.model, config=EngineConfig(pool_tokens=1024)) as engine:
        team = answering.AnsweringTeam(engine, work)
        for index, sample in read(tmp_path, "dense").items():
            answers = sample.answers.values()
            taken = sum(len(each.token_ids) + sum(len(ids) for ids, _ in each.prompt) for each in answers)
            assert taken <= team.num_tokens_at_most(index, work.rows[index]) <= taken + 5 * len(answers) * 20
        with pytest.raises(InvalidRequest, match="question 7: 'question'"):
            team.num_tokens_at_most(7, {"answer": "1"})
        assert list(serving.batches(engine, {3: 400, 5: 112, 6: 1, 8: 9000, 9: 1})) == [[3, 5], [6], [8], [9]]
        assert list(map(len, serving.batches(engine, dict.fromkeys(range(40), 1)))) == [16, 16, 8]


def read(tmp_path: Path, name: str) -> dict[int, Sample]:
    return SampleFile(tmp_path / "out" / "samples" / f"{name}.jsonl").by_index()


class Interrupted:
    """Ctrl-C at the nth call of something."""

    def __init__(self, work: Callable[..., Any], nth: int) -> None:
        self._work = work
        self._left = nth

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._work(*arguments, **named)


@pytest.mark.usefixtures("generous")
@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [
        (answering.AnsweringTeam, "_answers", 3),  # of the questions to learn from
        (answering.AnsweringTeam, "_answers", 4 + 10),
        (answering.AnsweringTeam, "_answers", NUM_TRAIN + 3),  # in the dense run
        (teaching.Lesson, "read", 3),
        (serving, "_serve_question", 3),
        (timing, "_time_team", 6),
        (replays, "_replayed", 2),
    ],
)
def test_an_interrupted_run_goes_on(
    module: Any, name: str, nth: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was at: nothing that was finished is computed again, and nothing is missing in the end."""
    arguments = [*arguments, "--modes=exact,kvcomm,paper,rotate"]
    with monkeypatch.context() as patched:
        patched.setattr(module, name, Interrupted(getattr(module, name), nth))
        if isinstance(module, type):  # bound again, as the method it was
            interrupted = module.__dict__[name]
            patched.setattr(module, name, lambda self, *given, **more: interrupted(self, *given, **more))
        assert gsm8k.main(arguments) == 130
    kept = kept_lines(tmp_path / "out")
    before = minutes_of(tmp_path / "out")
    assert before > 0
    assert gsm8k.main(arguments) == 0
    assert minutes_of(tmp_path / "out") > before
    after = kept_lines(tmp_path / "out")
    assert all(lines == after[file][: len(lines)] for file, lines in kept.items())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for mode in report["modes"]:
        assert mode["num_questions"] == 4
        assert mode["times"]["num_questions"] == 2
        assert len(mode["damage"]["divergences"]) == (0 if mode["mode"] == "dense" else 3 * 2)
    assert report["modes"][1]["damage"]["same"] == 1.0  # exact still is
    records = [line for lines in after.values() for line in lines]
    assert len(records) == len(set(records))


def minutes_of(folder: Path) -> float:
    """What all parts of a run have taken."""
    return float(json.loads((folder / "minutes.json").read_text())["minutes"])


def kept_lines(folder: Path) -> dict[str, list[str]]:
    """Whole lines of every file of records."""
    files = [*folder.glob("samples/*.jsonl"), *folder.glob("*.jsonl")]
    return {str(file.relative_to(folder)): file.read_text().splitlines() for file in files}


def test_a_line_that_was_cut_off_is_computed_again(arguments: list[str], tmp_path: Path) -> None:
    assert gsm8k.main([*arguments, "--modes=exact"]) == 0
    file = tmp_path / "out" / "samples" / "dense.jsonl"
    before, whole = read(tmp_path, "dense"), file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert gsm8k.main([*arguments, "--modes=exact"]) == 0
    assert read(tmp_path, "dense") == before


def test_a_further_mode_is_added(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main([*arguments, "--modes=exact"]) == 0
    assert gsm8k.main([*arguments, "--modes=rotate"]) == 0
    before = kept_lines(tmp_path / "out")
    assert gsm8k.main([*arguments, "--modes=rotate,paper"]) == 0
    after = kept_lines(tmp_path / "out")
    assert all(lines == after[file][: len(lines)] for file, lines in before.items())
    assert len(read(tmp_path, "paper")) == 4
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["train_rows"]
    capsys.readouterr()
    assert gsm8k.main([*arguments, "--modes=rotate", "--limit=2"]) == 1
    assert "holds a run with limit 4, not 2; give another --out" in capsys.readouterr().err


def test_a_failure_ends_the_run_at_once(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gsm8k.main([*arguments, "--max-new-tokens=500"]) == 1
    error = capsys.readouterr().err
    assert "question " in error
    assert "--max-new-tokens" in error
    assert "512" in error


def test_wrong_arguments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.main([*arguments, "--modes=dense,magic"]) == 1
    assert "unknown mode 'magic'; there are dense, exact, along, kvcomm, heal, rotate" in capsys.readouterr().err
    assert gsm8k.main([*arguments, f"--data={tmp_path / 'nothing'}"]) == 1
    assert "no such file or folder; give --data FILE or FOLDER" in capsys.readouterr().err
    assert gsm8k.main([*arguments, f"--data={tmp_path}"]) == 1
    assert "no gsm8k/test*.jsonl or .jsonl.gz" in capsys.readouterr().err
    assert gsm8k.main([*arguments, "--calibration=100"]) == 1
    assert "14 rows to learn from are too few; 110 are needed" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{not json\n")
    assert gsm8k.main([*arguments, f"--data={bad}", "--modes=exact"]) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert error.count("\n") == 1
    team = tmp_path / "team.toml"
    team.write_text(TEAM.replace("ignore_eos = true", "temperature = 0.5"))
    assert gsm8k.main([*arguments, "--modes=exact"]) == 1
    assert "agent 'first' of team 'tiny' does not decode greedily" in capsys.readouterr().err


def test_a_file_with_what_is_learned_from_beside_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data" / "gsm8k" / "test_public.jsonl"
    assert gsm8k.main([*arguments, f"--data={file}", "--modes=rotate", "--divergence=1", "--timed=0"]) == 0
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "questions.jsonl.gz"
    alone.write_bytes(gzip.compress(file.read_bytes()))
    capsys.readouterr()
    assert gsm8k.main([*arguments, f"--data={alone}", "--modes=rotate"]) == 1
    assert "has no train* beside it; give --train FILE" in capsys.readouterr().err
    out = f"--out={tmp_path / 'other'}"
    assert gsm8k.main([*arguments, f"--data={alone}", "--modes=exact", out, "--timed=0", "--divergence=0"]) == 0


def test_without_data_and_network_one_line_says_what_to_do(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert gsm8k.main([each for each in arguments if not each.startswith("--data")]) == 1
    error = capsys.readouterr().err
    assert "openai/gsm8k cannot be fetched; give --data FILE or FOLDER" in error
    assert error.count("\n") == 1


def test_seeds_choose_questions(arguments: list[str], tmp_path: Path) -> None:
    def asked(*more: str) -> set[int]:
        options = make_parser("gsm8k", 100, 0).parse_args([*arguments, "--limit=2", *more])
        return {int(str(row["answer"]).split()[-1]) for row in make_work(Gsm8k(), options, learns=False).rows}

    assert asked() == {0, 1}
    assert asked("--seed=3") == asked("--seed=3")
    assert {frozenset(asked(f"--seed={seed}")) for seed in range(1, 9)} != {frozenset({0, 1})}


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        ("a = 6\nb = 8\nprint(a * b)\nAnswer: 48", "48"),
        ("```python\nprint(1 / 0)\n```", "ZeroDivisionError: division by zero"),
        ("x = 3", "nothing"),
        ("I cannot write programs.", "nothing, for there is no program"),
        ("", "nothing, for there is no program"),
        ("print('x' * 10_000)", "x" * 200),
        ("import os\nos.fork()", "PermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_the_programmers_tool(answer: str, printed: str) -> None:
    if "fork" in answer and isolation(unsafe=True) == NONE:
        pytest.skip("nothing keeps programs apart here")
    assert Gsm8k(unsafe=True).use_tool("programmer", answer, {}) == printed


def test_readers_get_what_the_tool_gave(arguments: list[str], tmp_path: Path) -> None:
    """Behind the answer that it was made of, and moved together with it."""
    (tmp_path / "team.toml").write_text(TEAM.replace('"second"', '"programmer"'))
    assert gsm8k.main([*arguments, "--modes=rotate", "--timed=1", "--unsafe"]) == 0
    for index, sample in read(tmp_path, "dense").items():
        made = sample.answers["programmer"]
        assert made.result
        assert (made.token_ids + made.result, "programmer") in sample.answers["last"].prompt
        served = read(tmp_path, "rotate")[index].answers["last"].usage
        slots = sum(len(token_ids) for token_ids, name in sample.answers["last"].prompt if name is not None)
        # Of an answer that its producer has just decoded, the last token was never read.
        assert slots - 1 <= served["aligned"] <= slots


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
    assert (score.is_right, score.is_right_otherwise) == (right, strict)
