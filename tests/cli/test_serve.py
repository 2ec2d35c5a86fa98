"""`kvcomm serve` and its keys: help, settings, refusals before a model is loaded, and one run from start to SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvcomm.cli import app
from kvcomm.cli.serve import _serve
from kvcomm.errors import InvalidRequest
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings
from kvcomm.tiers.tier import Tier
from tests.limits import PATIENCE_S, process


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests look at comes before a model is loaded."""

    def load(*arguments: object, **settings: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kvcomm.engine.engine.Engine.load", load)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command printed as JSON."""
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["serve"], ["serve", "keys"], ["serve", "keys", "add"], ["serve", "keys", "ls"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*command, "--help"]) == 0
    assert "Examples: kvcomm serve" in capsys.readouterr().out


def test_the_effective_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nkeep_alive_s = 7\nlog_prompts = true\n[engine]\npage_size = 8\n")
    monkeypatch.setenv("KVCOMM_SERVE_CONFIG", str(file))
    monkeypatch.setenv("KVCOMM_SERVE_MAX_REQUESTS", "5")
    monkeypatch.setenv("KVCOMM_SERVE_PORT", "2")
    command = ["serve", "--check", "--json", "--port", "3", "--pool-tokens", "4096", "--no-log-prompts"]
    assert app.run(command) == 0
    settings = printed(capsys)["settings"]
    assert (settings["port"], settings["keep_alive_s"], settings["max_requests"]) == (3, 7, 5)
    assert settings["log_prompts"] is False
    assert (settings["engine"]["page_size"], settings["engine"]["pool_tokens"]) == (8, 4096)
    assert app.run(["serve", "--check"]) == 0
    assert "engine.page_size" in capsys.readouterr().out


def test_hosts_and_origins_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--allowed-host", "Host.Docker.Internal", "--allowed-host", "10.0.0.7:80", "--cors-origin", "http://a:80"]
    assert app.run(["serve", "--check", "--json", *given]) == 0
    settings = printed(capsys)["settings"]
    assert settings["allowed_hosts"] == ["host.docker.internal", "10.0.0.7:80"]
    assert settings["cors_origins"] == ["http://a"]


def test_a_prior_is_named_by_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["serve", "--check", "--json", "--prior", "prior.json"]) == 0
    assert printed(capsys)["settings"]["prior"] == "prior.json"
    assert app.run(["serve", "--check", "--json"]) == 0
    assert printed(capsys)["settings"]["prior"] is None


def test_kv_events_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--kv-events", "tcp://*:5557", "--kv-events-replay", "tcp://*:5558", "--kv-events-format", "array"]
    tenants = ["--kv-events-tenant", "ann", "--kv-events-tenant", "bob="]
    assert app.run(["serve", "--check", "--json", *given, *tenants, "--kv-events-seed", "0"]) == 0
    settings = printed(capsys)["settings"]
    assert settings["kv_events"] == {
        "url": "tcp://*:5557",
        "topic": None,
        "format": "array",
        "replay": "tcp://*:5558",
        "block_size": 16,
        "seed": "0",
        "tenants": {"ann": "ann", "bob": ""},
    }
    assert app.run(["serve", "--check", "--json"]) == 0
    assert printed(capsys)["settings"]["kv_events"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "refusing to listen on 0.0.0.0 without keys"),
        (["--keys", "/nowhere/keys.json"], 1, "key file /nowhere/keys.json cannot be read"),
        (["--config", "/nowhere/server.toml"], 2, "/nowhere/server.toml cannot be read"),
        (["--port", "70000"], 2, "setting 'port' in the command line"),
        (["--host", "192.0.2.1", "--keys"], 2, "cannot listen on 192.0.2.1:8000"),
        (["--traces", "collector:4318"], 2, "setting 'traces' in the command line"),
        (["--kv-events", "5557"], 2, "setting 'kv_events.url' in the command line"),
        (["--kv-events-topic", "kv@pod@model"], 2, "setting 'kv_events.url' in the command line: Field required"),
        (["--kv-events", "tcp://*:1", "--kv-events-format", "xml"], 2, "setting 'kv_events.format' in the command"),
        (["--kv-events", "tcp://*:1", "--kv-events-block-size", "0"], 2, "setting 'kv_events.block_size' in the"),
        (["--kv-events", "tcp://*:1", "--kv-events-tenant", "="], 2, "--kv-events-tenant '=': no name"),
        (
            ["--kv-events", "tcp://*:1", "--kv-events-tenant", "a=s", "--kv-events-tenant", "b=s"],
            2,
            "must give each tenant a salt of its own, and that of 'a', 's', is another's too",
        ),
        (["--kv-events", "tcp://*:70000"], 2, "setting 'kv_events.url' in the command line"),
        (["--kv-events", "ipc:///nowhere/events"], 2, "KV events cannot listen on ipc:///nowhere/events"),
        (["--kv-events", "tcp://*:1", "--keys"], 2, "with keys only tenants that are named are announced"),
        (["--log-level", "loud"], 2, "setting 'log_level' in the command line"),
        (["--allowed-host", "http://x"], 2, "setting 'allowed_hosts.0' in the command line"),
        (["--cors-origin", "x.example"], 2, "setting 'cors_origins.0' in the command line"),
        (["--cors-origin", "*"], 2, "refusing --cors-origin '*' without keys"),
    ],
)
def test_refusals_come_first(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[-1] == "--keys":
        app.run(["serve", "keys", "add", "ann", "--keys", str(tmp_path / "keys.json")])
        arguments = [*arguments, str(tmp_path / "keys.json")]
    assert app.run(["serve", *arguments]) == code
    assert message in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.run(["serve"]) == 1
    error = capsys.readouterr().err
    assert error == "error: the server needs fastapi, uvicorn, prometheus_client: pip install 'kvcomm[server]'\n"


def test_importing_needs_no_server() -> None:
    code = "import sys, kvcomm.cli.app, kvcomm.server.settings, kvcomm.server.keys; print('fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_keys_from_making_to_removing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "keys.json"
    keys = ["--keys", str(file), "--json"]
    limits = ["--requests-per-minute", "30", "--held-tokens", "1000", "--when-full", "refuse"]
    assert app.run(["serve", "keys", "add", "ann", "--tenant", "team", *limits, *keys]) == 0
    made = printed(capsys)
    assert app.run(["serve", "keys", "add", "root", "--role", "admin", *keys]) == 0
    root = printed(capsys)["key"]
    assert root != made["key"]

    found = KeyRing(file).find(made["key"])
    assert found is not None
    assert found.tenant == "team"
    assert found.limits is not None
    assert (found.limits.requests_per_minute, found.limits.when_full) == (30, "refuse")

    assert app.run(["serve", "keys", "ls", *keys]) == 0
    listed = capsys.readouterr().out
    assert [each["name"] for each in json.loads(listed)["keys"]] == ["ann", "root"]
    assert made["key"] not in listed
    assert "sha256" not in listed
    assert app.run(["serve", "keys", "ls", "--keys", str(file)]) == 0
    assert "requests_per_minute=30" in capsys.readouterr().out

    assert app.run(["serve", "keys", "rm", "ann", *keys]) == 0
    assert KeyRing(file).find(made["key"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "a b"], "'a b' is not a name"),
        (["add", "ann", "--role", "king"], "--role 'king' is none of tenant, admin, metrics"),
        (["add", "ann", "--when-full", "explode"], "--when-full: "),
        (["add", "ann", "--held-tokens", "0"], "--held-tokens: "),
        (["add", "ann", "--role", "admin", "--max-requests", "1"], "belongs to no tenant"),
    ],
)
def test_keys_that_cannot_be_made(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["serve", "keys", *arguments, "--keys", str(tmp_path / "keys.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_run(model_folder: Path, tmp_path: Path) -> None:
    """From the command line to SIGTERM, with the log on stderr and what is in force on stdout."""
    command = [sys.executable, "-m", "kvcomm", "serve", "--model", str(model_folder), "--port", "0", "--json"]
    environment = {**os.environ, "KVCOMM_SERVE_ENGINE__POOL_TOKENS": "4096"}
    with process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        text = ""
        while not text.endswith("\n}\n"):
            line = server.stdout.readline()
            assert line, server.communicate()
            text += line
        told = json.loads(text)
        assert told["settings"]["engine"]["pool_tokens"] == 4096
        name = told["settings"]["model"].rsplit("/", 1)[1]
        body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        url = told["address"] + "/v1/chat/completions"
        answer = httpx2.post(url, json=body, timeout=PATIENCE_S)
        assert answer.json()["usage"]["completion_tokens"] <= 4
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (request,) = [line for line in lines if line["message"] == "request"]
    assert request["status"] == 200


def test_a_tier_is_closed_where_the_rest_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: what was opened before a mistake was found stayed open."""
    closed: list[str] = []
    real = Tier.close

    def close(tier: Tier) -> None:
        closed.append(tier.url)
        real(tier)

    def bind(settings: ServerSettings) -> None:
        raise InvalidRequest("the port is taken")

    monkeypatch.setattr(Tier, "close", close)
    monkeypatch.setattr("kvcomm.server.listening.bind", bind)
    with pytest.raises(InvalidRequest, match="the port is taken"):
        _serve(ServerSettings(tier=str(tmp_path)), as_json=False)
    assert len(closed) == 1
