"""`kvcomm run`: it prints what a group on an engine answers, can be interrupted, and finds mistakes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcomm.agents import Agent, KVCommAgentGroup, load_team
from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from tests.limits import PATIENCE_S, process

REPOSITORY = Path(__file__).parents[2]
TEAM = """
[inputs]
style = "short"
[[agents]]
name = "solver"
system = "You solve."
prompt = "Question: {question} ({style})"
[[agents]]
name = "critic"
prompt = "Question: {question} Proposed: {solver} Before: {critic@previous}"
sampling = { temperature = 1.0, seed = 3 }
"""

pytestmark = pytest.mark.usefixtures("home", "engines")


@pytest.fixture
def team(tmp_path: Path) -> str:
    file = tmp_path / "team.toml"
    file.write_text(TEAM)
    return str(file)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = run(["run", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def printable(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def test_team(capsys: pytest.CaptureFixture[str], team: str, model_folder: Path) -> None:
    found = call(capsys, team, "--input", "question=how = many?", "--rounds", "2", "--max-new-tokens", "7")
    with Engine.load(model_folder) as judge:
        group = KVCommAgentGroup(judge, sampling=SamplingParams(max_new_tokens=7))
        solver, critic = load_team(team).agents
        group.add(solver)
        sampling = SamplingParams(max_new_tokens=7, temperature=1.0, seed=3)
        group.add(Agent("critic", prompt=critic.prompt, sampling=sampling))
        wanted = group.run(2, question="how = many?", style="short")
    assert (found["team"], found["model"], found["final"]) == ("team", str(model_folder), ["critic"])
    texts = [{name: answer["text"] for name, answer in answers.items()} for answers in found["rounds"]]
    assert texts == [{name: answer.text for name, answer in answers.items()} for answers in wanted.rounds]
    usage = found["rounds"][1]["solver"]["usage"]
    assert usage["exact_tokens"] == usage["prompt_tokens"] - 1  # asked the same in round 1
    assert usage["prompt_tokens"] == usage["exact_tokens"] + usage["computed_tokens"]
    assert usage["reasons"] == {"last_token": 1}


def test_sampling_of_the_command_line_wins_field_by_field(capsys: pytest.CaptureFixture[str], team: str) -> None:
    arguments = [team, "--input", "question=why?", "--max-new-tokens", "5"]
    answers = [
        call(capsys, *arguments, *more)["rounds"][0]["critic"]["text"]
        for more in ([], ["--seed", "4"], ["--temperature", "0"])
    ]
    assert len(set(answers)) == 3


@pytest.mark.parametrize(("says", "flags", "wanted"), [(None, [], True), (False, [], False), (True, ["no"], False)])
def test_who_says_whether_agents_read_along(
    says: bool | None,
    flags: list[str],
    wanted: bool,
    capsys: pytest.CaptureFixture[str],
    team: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Engine] = []
    open_prompt = Engine.open_prompt

    def counted(engine: Engine, *operands: Any, **settings: Any) -> Any:
        opened.append(engine)
        return open_prompt(engine, *operands, **settings)

    monkeypatch.setattr(Engine, "open_prompt", counted)
    if says is not None:
        Path(team).write_text(f"[defaults]\nread_along = {str(says).lower()}\n{TEAM}")
    arguments = [team, "--input", "question=why?", "--max-new-tokens", "2"]
    call(capsys, *arguments, *(f"--{flag}-read-along" for flag in flags))
    assert bool(opened) == wanted


def test_inputs_of_the_team_are_defaults(capsys: pytest.CaptureFixture[str], team: str) -> None:
    plain = call(capsys, team, "--input", "question=why?", "--max-new-tokens", "2")
    longer = call(capsys, team, "--input", "question=why?", "--input", "style=very long", "--max-new-tokens", "2")
    tokens = [found["rounds"][0]["solver"]["usage"]["prompt_tokens"] for found in (plain, longer)]
    assert tokens[0] < tokens[1]


def test_prompt_gets_the_chat_template(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    found = call(capsys, "--prompt", "The dog {x}", "--max-new-tokens", "8")
    raw = call(capsys, "--prompt", "The dog {x}", "--max-new-tokens", "8", "--raw")
    with Engine.load(model_folder) as judge:
        rendered = judge.tokenizer.apply_chat_template(
            [{"role": "user", "content": "The dog {x}"}], tokenize=False, add_generation_prompt=True
        )
        chat = judge.generate([judge.segment(part) for part in _parts(rendered, "The dog {x}")], max_new_tokens=8)
        plain = judge.generate("The dog {x}", max_new_tokens=8)
    assert (found["team"], found["final"]) == (None, ["answer"])
    assert found["rounds"][0]["answer"]["text"] == chat.text
    assert found["rounds"][0]["answer"]["usage"]["prompt_tokens"] == chat.usage.prompt_tokens
    assert raw["rounds"][0]["answer"]["text"] == plain.text
    assert raw["rounds"][0]["answer"]["token_ids"] == list(plain.token_ids)


def _parts(text: str, middle: str) -> list[str]:
    before, _, after = text.partition(middle)
    return [before, middle, after]


def test_for_people(capsys: pytest.CaptureFixture[str], team: str) -> None:
    arguments = [team, "--input", "question=why?", "--max-new-tokens", "5"]
    found = call(capsys, *arguments)["rounds"][0]

    assert run(["run", *arguments]) == 0
    out = capsys.readouterr().out
    answers, table, legend = out.rsplit("\n\n", 2)
    for name in ("solver", "critic"):
        lines = [line for line in printable(found[name]["text"]).split("\n") if line]
        assert f"{name} | {lines[0]}" in answers
    header, *rows = table.splitlines()
    assert header.split() == [
        "agent",
        "prompt",
        "tokens",
        "exact",
        "moved",
        "computed",
        "read",
        "along",
        "generated",
        "first",
        "token",
        "tokens/s",
    ]
    assert all(f"{word}: " in legend for word in ("exact", "moved", "computed", "read along"))
    counts = [[int(cell) for cell in row.split()[1:7]] for row in rows]
    assert [row.split()[0] for row in rows] == ["solver", "critic", "all"]
    assert counts[2] == [sum(pair) for pair in zip(*counts[:2], strict=True)]
    usage = found["critic"]["usage"]
    assert counts[1][0] == usage["prompt_tokens"]
    assert all(count[0] == sum(count[1:4]) and count[4] <= count[3] for count in counts)

    assert run(["run", *arguments, "--no-stream", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "critic |" not in out
    *_, table, _ = out.rsplit("\n\n", 2)
    rows = [row.split()[:2] for row in table.splitlines()[-5:]]
    assert rows[:4] == [[name, number] for number in "12" for name in ("solver", "critic")]
    assert rows[4][0] == "all"


def test_stream_with_json_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--prompt", "The dog", "--raw", "--max-new-tokens", "5", "--json", "--stream"]) == 0
    out, err = capsys.readouterr()
    assert err == printable(json.loads(out)["rounds"][0]["answer"]["text"]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a team or --prompt"),
        (("gsm8k", "--prompt", "x"), "give either a team or --prompt"),
        (("nix",), "no team 'nix'"),
        (("gsm8k",), "team 'gsm8k' needs --input question=TEXT"),
        (("gsm8k", "--input", "question"), "--input 'question' is not of the form NAME=TEXT"),
        (("gsm8k", "--input", "question=1", "--input", "question=2"), "--input 'question' is given twice"),
        (("gsm8k", "--raw", "--input", "question=1"), "--raw goes with --prompt"),
        (("--prompt", "x", "--rounds", "2"), "go with a team"),
        (("--prompt", "x", "--input", "a=b"), "go with a team"),
        (("--prompt", "x", "--no-read-along"), "go with a team"),
        (("--prompt", " \n"), "the prompt is empty"),
        (("--prompt", "x", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
        (("--prompt", "x", "--temperature", "inf"), "temperature must be"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], engines: list[Engine]
) -> None:
    assert run(["run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert run(["run", *arguments, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().err)["error"]["message"]
    assert engines == []


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("--prompt", "x " * 9000), 2, "PromptTooLong"),
        (("--prompt", "x " * 9000, "--raw"), 2, "PromptTooLong"),
        (("gsm8k", "--input", "question=x", "--input", "nix=y"), 2, "TemplateError"),
        (("--prompt", "x", "--model", "nix"), 1, "UnknownModel"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["type"] == kind


@pytest.mark.parametrize(
    "arguments", [["--prompt", "x"], ["--prompt", "x", "--raw"], ["gsm8k", "--input", "question=x"]]
)
def test_interrupt(
    arguments: list[str],
    engines: list[Engine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(text: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcomm.cli.progress.printable", interrupt)
    assert run(["run", *arguments, "--max-new-tokens", "4000"]) == 130
    assert capsys.readouterr().err == ""
    assert len(engines) == 1  # and the fixture finds nothing left in it


def test_ctrl_c_in_a_process(model_folder: Path) -> None:
    """The signal itself, in the middle of an answer: exit code 130, no traceback."""
    command = [sys.executable, "-m", "kvcomm", "run", "--raw", "--prompt", "The dog", "--max-new-tokens", "8000"]
    environment = {**os.environ, "KVCOMM_MODEL": str(model_folder), "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": 4096}  # too small for the whole answer
    with process(command, env=environment, **pipes) as started:
        assert started.stdout.read(1)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=PATIENCE_S)
        assert started.returncode == 130
    assert b"Traceback" not in errors
