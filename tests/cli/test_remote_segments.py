"""`kvcomm segment --server URL` against a real server with keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.settings import ServerSettings
from tests.server.live import Live, serving
from tests.tiny import tiny_model


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A server that knows one key, which is in the environment."""
    file, tiny = tmp_path / "keys.json", tiny_model()
    monkeypatch.setenv("KVCOMM_API_KEY", add_key(file, "ann"))
    config = EngineConfig(page_size=4, pool_tokens=1024)
    with (
        Engine(tiny.model, tiny.tokenizer, config=config) as engine,
        serving(engine, ServerSettings(model="tiny", port=0), keys=KeyRing(file)) as running,
    ):
        yield running


def test_life_of_a_segment(live: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        assert run(["segment", *arguments, "--server", live.url, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    (tmp_path / "two.txt").write_text("two \x1b[31m[bold]")
    added = [call("add", "role", "--text", "one"), call("add", "role", "--file", str(tmp_path / "two.txt"))]
    assert [each["version"] for each in added] == [1, 2]
    assert call("ls")["data"] == added[1:]
    assert call("show", "role")["content"] == "two \x1b[31m[bold]"

    for arguments, shown in ((["ls"], "role"), (["show", "role"], "two \ufffd[31m[bold]")):
        assert run(["segment", *arguments, "--server", live.url]) == 0
        assert shown in capsys.readouterr().out

    assert run(["segment", "rm", "role", "other", "--server", live.url]) == 1
    assert "there is no segment 'other'" in capsys.readouterr().err
    assert call("rm", "role")["removed"][0]["versions"] == 2
    assert run(["segment", "ls", "--server", live.url]) == 0
    assert "no segments" in capsys.readouterr().out


def test_refusals_are_one_line(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["ls", "--server", live.url, "--key", "wrong"], "this API key is not known"),
        (["ls", "--server", "http://127.0.0.1:9"], "does not answer"),
        (["show", "../x", "--server", live.url], "404"),
        (["add", "x", "--server", live.url], "either --text or --file"),
    ):
        assert run(["segment", *arguments]) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
