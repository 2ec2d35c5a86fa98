"""`kvcomm segment`: stored ids and digests are those an engine gives; foreign files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("home", "engines")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["segment", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_life_of_a_segment(
    capsys: pytest.CaptureFixture[str], home: Path, model_folder: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    text = "Tools:\n[bold] dog\u00e9 \x1b[31m"
    (tmp_path / "tools.txt").write_text(text, encoding="utf-8")
    added = call(capsys, "add", "tools", "--file", str(tmp_path / "tools.txt"))
    with Engine.load(model_folder) as judge:
        segment = judge.segment(text)
        assert added["digest"] == segment.digest(judge.namespace())
        assert added["num_tokens"] == len(segment.token_ids)
    num_engines = len(engines)

    (listed,) = call(capsys, "ls")["segments"]
    assert (listed["name"], listed["digest"], listed["refusal"]) == ("tools", added["digest"], None)
    shown = call(capsys, "show", "tools")
    assert (shown["text"], tuple(shown["token_ids"])) == (text, segment.token_ids)
    assert shown["model"] == str(model_folder)

    assert run(["segment", "show", "tools"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n\nTools:\n[bold] dog\u00e9 \ufffd[31m\n")
    assert added["digest"] in out

    (removed,) = call(capsys, "rm", "tools")["removed"]
    assert removed["freed_bytes"] > 0
    assert list(home.iterdir()) == []
    assert len(engines) == num_engines  # only adding needs the model


def test_for_people(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert run(["segment", "ls"]) == 0
    assert capsys.readouterr().out == f"no segments in {home}\n"
    assert run(["segment", "add", "a", "--text", "a"]) == 0
    assert capsys.readouterr().out.startswith("added a: 1 token, ")
    assert run(["segment", "ls"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "tokens", "digest", "model", "age"]
    assert row.split()[:2] == ["a", "1"]
    assert run(["segment", "rm", "a"]) == 0
    assert capsys.readouterr().out.startswith("removed a, ")


def test_refused_files(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    call(capsys, "add", "good", "--text", "a")
    (home / "bad.segment.json").write_text("{")
    assert run(["segment", "ls"]) == 0
    out = capsys.readouterr().out
    assert "is not a segment file of this version" in out
    assert "Remove it with `kvcomm segment rm NAME`." in out
    assert run(["segment", "show", "bad"]) == 1
    assert f"{home / 'bad.segment.json'} is not a segment" in capsys.readouterr().err
    assert call(capsys, "show", "good")["text"] == "a"
    call(capsys, "rm", "bad")
    assert [entry["name"] for entry in call(capsys, "ls")["segments"]] == ["good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "x"), "give either --text or --file"),
        (("add", "x", "--text", "a", "--file", "b"), "give either --text or --file"),
        (("add", "x", "--text", ""), "the text of segment 'x' has no tokens"),
        (("add", "taken", "--text", "a"), "segment 'taken' exists"),
        (("add", "a/b", "--text", "a"), "bad name 'a/b'"),
        (("show", "x"), "no segment 'x'"),
        (("rm", "taken", "x"), "no segment 'x'"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], home: Path) -> None:
    call(capsys, "add", "taken", "--text", "a")
    assert run(["segment", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)
    assert [file.name for file in home.iterdir()] == ["taken.segment.json"]


def test_force_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "add", "x", "--text", "a")
    call(capsys, "add", "x", "--text", "b", "--force")
    assert call(capsys, "show", "x")["text"] == "b"
