"""`kvcomm model`: what is listed, fetched and removed, for people and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.model import registry
from kvcomm.model.registry import PackagedModel
from tests.model.tiny_wheel import make_wheel
from tests.tiny import tiny_model


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The one packaged model, "tiny", in an empty cache folder."""
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVCOMM_WHEELS", str(tmp_path))
    made = make_wheel(tmp_path, tiny_model())
    monkeypatch.setattr(registry, "PACKAGED", {made.name: made})
    return made


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_life_of_a_model(entry: PackagedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / "models" / "tiny"

    (absent,) = run_json(capsys, "model", "ls")["models"]
    fetched = run_json(capsys, "model", "fetch", "tiny")
    (ready,) = run_json(capsys, "model", "ls")["models"]
    os.truncate(folder / "model.safetensors", 5)
    (damaged,) = run_json(capsys, "model", "ls")["models"]
    removed = run_json(capsys, "model", "rm", "tiny")
    again = run_json(capsys, "model", "rm", "tiny")

    assert (absent["state"], absent["num_bytes"]) == ("absent", 0)
    assert fetched == {"name": "tiny", "folder": str(folder)}
    assert (ready["state"], ready["folder"], ready["reason"]) == ("ready", str(folder), None)
    assert (damaged["state"], "of 5 bytes" in damaged["reason"]) == ("damaged", True)
    assert removed == {"name": "tiny", "removed": True, "freed_bytes": damaged["num_bytes"]}
    assert again == {"name": "tiny", "removed": False, "freed_bytes": None}
    assert not folder.exists()


def test_for_people(entry: PackagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "fetch", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny is ready in ")
    assert "converting tiny.gguf" in err

    assert run(["model", "ls"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "state", "size", "license", "from", "folder"]
    assert row.split()[:2] == ["tiny", "ready"]

    assert run(["model", "rm", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("removed tiny, ")
    assert run(["model", "rm", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny was not there\n"


def test_force_replaces_a_damaged_model(entry: PackagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run_json(capsys, "model", "fetch", "tiny")["folder"])
    (folder / "config.json").unlink()

    assert run(["model", "fetch", "tiny"]) == 1
    assert "error: " in capsys.readouterr().err
    run_json(capsys, "model", "fetch", "tiny", "--force")
    assert (folder / "config.json").is_file()


def test_unknown_name(entry: PackagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "fetch", "nix"]) == 1
    assert capsys.readouterr().err == "error: no packaged model is called 'nix'; there are: tiny\n"
