"""`python -m eval.kv_events`: its figures, and that they would see a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import kv_events
from eval.kv_events import Case, mirrored, second_names
from kvcomm.server.kv_events.announcer import Announcer
from kvcomm.server.kv_events.blocks import Owner


def run(out: Path, *more: str) -> dict[str, float]:
    """Figures by id."""
    assert kv_events.main(["--operations=60", "--paths=20", "--json", "--out", str(out), *more]) == 0
    return {figure["id"]: figure["value"] for figure in json.loads(out.read_text())["figures"]}


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(tmp_path / "run.json")
    assert (figures["hashes_equal"], figures["mirror_equal"], figures["mirror_operations"]) == (1, 1, 60)
    assert figures["hashes"] > 100
    assert figures["mirror_blocks"] > 0
    assert json.loads(capsys.readouterr().out)["config"]["vllm"] is None


def test_another_hash_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.kv_events.as_int", lambda name: int.from_bytes(name[:8], "big"))
    assert run(tmp_path / "run.json")["hashes_equal"] < 0.01


def test_a_forgotten_removal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Announcer, "_removed", lambda *arguments: None)
    done = mirrored(200, 0)
    assert done.num_equal < done.num_operations


def test_a_python_without_vllm_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no vllm' >&2\nexit 1\n")
    python.chmod(0o755)
    arguments: list[Any] = ["--operations=1", "--paths=1", "--vllm-python", str(python)]
    assert kv_events.main(arguments) == 1
    assert "cannot ask vLLM: ModuleNotFoundError: no vllm" in capsys.readouterr().err
    assert kv_events.main([*arguments[:2], "--vllm-python", str(tmp_path / "nothing")]) == 1


def test_the_second_derivation_begins_as_the_standard_says() -> None:
    """RFC 8949, appendix A: the first bytes of numbers, texts and lists by their size."""
    assert [kv_events._cbor(value).hex() for value in (0, 23, 24, 1000, 2**32, "ü", b"\x01", [1, None])] == [
        "00",
        "17",
        "1818",
        "1903e8",
        "1b0000000100000000",
        "62c3bc",
        "4101",
        "8201f6",
    ]
    assert second_names(Case([1, 2, 3], Owner(), 4)) == []
