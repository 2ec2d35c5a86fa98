"""`kvcomm serve tenants` and `kvcomm serve keys rm --purge` against a real server with keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvcomm.cli import serve_tenants
from kvcomm.cli.app import run
from kvcomm.cli.remote import ask_json
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyFile, KeyRing, Role, add_key
from kvcomm.server.settings import ServerSettings
from tests.server.live import Live, serving
from tests.tiny import tiny_model


class Running(NamedTuple):
    """A server, its engine, its key file and keys by name."""

    live: Live
    engine: Engine
    file: Path
    keys: dict[str, str]

    def ask(self, who: str, method: str, path: str, body: Any = None) -> Any:
        """A tenant's request."""
        return ask_json(method, self.live.url + path, body, key=self.keys[who])

    def fill(self, who: str) -> str:
        """A pinned context, a segment and a snapshot; returns the context's id."""
        made = self.ask(who, "POST", "/v1/contexts", {"text": "The quick brown fox", "pinned": True, "name": "[bold]x"})
        self.ask(who, "PUT", "/v1/segments/role", {"content": "A text"})
        self.ask(who, "POST", f"/v1/contexts/{made['id']}/snapshot", {"name": "base"})
        return str(made["id"])


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    file, tiny = tmp_path / "keys.json", tiny_model()
    keys = {name: add_key(file, name) for name in ("ann", "bob")}
    keys["admin"] = add_key(file, "admin", role=Role.ADMIN)
    monkeypatch.setenv("KVCOMM_ADMIN_KEY", keys["admin"])
    settings = ServerSettings(model="tiny", port=0, snapshots=tmp_path / "snapshots")
    with (
        Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=1024)) as engine,
        serving(engine, settings, keys=KeyRing(file)) as live,
    ):
        yield Running(live, engine, file, keys)


def test_looking_and_removing(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> Any:
        assert run(["serve", "tenants", *arguments, "--server", running.live.url, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    contexts = {name: running.fill(name) for name in ("ann", "bob")}
    assert [(each["name"], each["pinned_contexts"]) for each in call("ls")["data"]] == [("ann", 1), ("bob", 1)]
    shown = call("show", "ann")
    assert [each["id"] for each in shown["contexts"]] == [contexts["ann"]]
    assert [each["name"] for each in (*shown["segments"], *shown["snapshots"])] == ["role", "base"]

    for arguments in (["ls"], ["show", "ann"]):
        assert run(["serve", "tenants", *arguments, "--server", running.live.url]) == 0
        assert "ann" in capsys.readouterr().out

    wrong = ["serve", "tenants", "rm", "ann", "--context", contexts["bob"], "--server", running.live.url]
    assert run(wrong) == 1
    assert "404" in capsys.readouterr().err
    call("rm", "ann", "--context", contexts["ann"], "--segment", "role", "--snapshot", "base")
    shown = call("show", "ann")
    assert (shown["contexts"], shown["segments"], shown["snapshots"]) == ([], [], [])
    assert len(running.engine.contexts) == 1

    removed = call("rm", "bob")
    assert (removed["contexts"], removed["segments"], removed["snapshots"]) == (1, 1, 0)
    assert running.engine.contexts == ()
    assert call("rm", "bob", "--snapshots")["snapshots"] == 1
    assert run(["serve", "tenants", "rm", "zoe", "--server", running.live.url]) == 1
    assert "there is no tenant 'zoe'" in capsys.readouterr().err


def test_a_tenants_key_is_not_enough(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ls"], ["show", "bob"], ["rm", "bob"]):
        command = ["serve", "tenants", *arguments, "--server", running.live.url, "--key", running.keys["ann"]]
        assert run(command) == 1
        assert "answered 403" in capsys.readouterr().err


def test_the_last_key_with_all_that_its_tenant_has(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    add_key(running.file, "ann2", tenant="ann")
    for name in ("ann", "bob"):
        running.fill(name)
    where = ["--keys", str(running.file), "--purge", "--server", running.live.url, "--json"]
    assert run(["serve", "keys", "rm", "ann2", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": "ann2", "purged": None}
    assert len(running.engine.contexts) == 2
    assert run(["serve", "keys", "rm", "ann", "--snapshots", *where]) == 0
    purged = json.loads(capsys.readouterr().out)["purged"]
    assert (purged["name"], purged["contexts"], purged["segments"], purged["snapshots"]) == ("ann", 1, 1, 1)
    assert len(running.engine.contexts) == 1
    assert [each["name"] for each in running.ask("bob", "GET", "/v1/segments")["data"]] == ["role"]


def test_nothing_is_removed_before_the_server_would_do_its_part(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running.fill("ann")
    keys = ["serve", "keys", "rm", "ann", "--keys", str(running.file)]
    for extra, code, message in (
        (["--snapshots"], 2, "--snapshots needs --purge"),
        (["--purge", "--server", "http://127.0.0.1:9"], 1, "does not answer"),
        (["--purge", "--server", running.live.url, "--key", running.keys["bob"]], 1, "answered 403"),
    ):
        assert run([*keys, *extra]) == code
        assert message in capsys.readouterr().err
        assert [each.name for each in KeyFile.read(running.file).keys] == ["ann", "bob", "admin"]

    monkeypatch.setattr(serve_tenants, "FOLLOWING_S", 0.5)
    other = tmp_path / "other.json"
    add_key(other, "ann")
    assert run(["serve", "keys", "rm", "ann", "--keys", str(other), "--purge", "--server", running.live.url]) == 1
    assert "still knows a key of 'ann', so it reads another file" in capsys.readouterr().err
    assert len(running.engine.contexts) == 1
