"""`kvcomm snapshot`: files that leave and come back, and rows for those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine
from tests.cli.test_store import write_context

pytestmark = pytest.mark.usefixtures("home", "engines")


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert run(["snapshot", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


def test_there_and_back(capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path, model_folder: Path) -> None:
    created = call(capsys, "context", "create", "left", "--text", "The quick brown fox")
    file = tmp_path / "backups" / "left.safetensors"
    saved = call(capsys, "snapshot", "save", "left", str(file))
    assert saved["num_bytes"] == created["num_bytes"]
    assert not file.samefile(created["file"])

    (listed,) = call(capsys, "snapshot", "ls", str(file.parent))["snapshots"]
    assert (listed["name"], listed["num_tokens"], listed["refusal"]) == (str(file), created["num_tokens"], None)

    call(capsys, "context", "rm", "left")
    restored = call(capsys, "snapshot", "restore", str(file), "right")
    assert restored["num_tokens"] == created["num_tokens"]
    assert (home / "right.safetensors").read_bytes() == file.read_bytes()
    with Engine.load(model_folder) as judge, judge.restore(home / "right.safetensors") as context:
        assert context.text == "The quick brown fox"

    (removed,) = call(capsys, "snapshot", "rm", str(file))["removed"]
    assert removed == {"file": str(file), "freed_bytes": saved["num_bytes"]}
    assert not file.exists()


def test_ls_refuses_in_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path) -> None:
    good = write_context(tmp_path / "good.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-3])
    (tmp_path / "other.txt").write_text("not looked at in a folder")
    notes = tmp_path / "other.txt"

    found = call(capsys, "snapshot", "ls", str(tmp_path), str(model_folder), str(notes), code=1)["snapshots"]
    assert [(Path(entry["file"]).name, entry["refusal"] is None) for entry in found] == [
        ("cut.safetensors", False),
        ("good.safetensors", True),
        ("model.safetensors", False),
        ("other.txt", False),
    ]
    assert found[2]["refusal"] == "is a safetensors file but not a kvcomm snapshot"

    assert run(["snapshot", "ls", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{cut}" in out
    assert "is not a whole safetensors file" in out
    assert run(["snapshot", "ls", str(good)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "tokens", "steps", "fidelity", "model", "size", "age"]
    assert row.split()[:4] == [str(good), "3", "1", "exact"]


def test_ls_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["snapshot", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no snapshots there\n"
    assert "nix does not exist" in error(capsys, "ls", str(tmp_path / "nix"), code=2)


def test_every_byte_is_checked_on_restore(
    capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path, other_model_folder: Path
) -> None:
    created = call(capsys, "context", "create", "left", "--text", "The dog")
    content = Path(created["file"]).read_bytes()
    for at in (9, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[at] ^= 4
        (tmp_path / "x.safetensors").write_bytes(broken)
        assert "x.safetensors" in error(capsys, "restore", str(tmp_path / "x.safetensors"), "right", code=1)
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(content)
    foreign = error(capsys, "restore", str(whole), "right", "--model", str(other_model_folder), code=1)
    assert "belongs to another namespace" in foreign
    assert sorted(file.name for file in home.iterdir()) == ["left.safetensors"]


def test_nothing_is_overwritten_unasked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(capsys, "context", "create", "left", "--text", "The dog")
    target = tmp_path / "x.safetensors"
    target.write_text("precious")
    assert "x.safetensors exists" in error(capsys, "save", "left", str(target), code=2)
    assert target.read_text() == "precious"
    call(capsys, "snapshot", "save", "left", str(target), "--force")
    assert "context 'left' exists" in error(capsys, "restore", str(target), "left", code=2)
    call(capsys, "snapshot", "restore", str(target), "left", "--force")
    assert "no context 'nix'" in error(capsys, "save", "nix", str(tmp_path / "y"), code=2)


def test_rm_keeps_what_is_no_snapshot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, notes = write_context(tmp_path / "good.safetensors"), tmp_path / "notes.txt"
    notes.write_text("precious")
    assert "not removed: " in error(capsys, "rm", str(good), str(notes), code=2)
    assert (good.exists(), notes.exists()) == (True, True)
    assert "does not exist" in error(capsys, "rm", str(tmp_path / "nix"), code=2)
    call(capsys, "snapshot", "rm", str(good), str(notes), "--force")
    assert (good.exists(), notes.exists()) == (False, False)
