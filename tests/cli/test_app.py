"""The entry point: help, exit codes, and errors as one line or as JSON on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvcomm
from kvcomm.cli import app, model
from kvcomm.cli.output import format_bytes
from kvcomm.errors import EmptyPrompt, KVCommError, UnknownModel
from tests.limits import PATIENCE_S, process

REPOSITORY = Path(__file__).parents[2]


def raise_from_ls(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def list_models() -> None:
        raise error

    monkeypatch.setattr("kvcomm.model.packaged.list_models", list_models)


@pytest.mark.parametrize(
    ("error", "code"), [(UnknownModel("no such\n thing"), 1), (KVCommError("x"), 1), (EmptyPrompt("empty"), 2)]
)
def test_errors_are_one_line_on_stderr(
    error: KVCommError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_from_ls(monkeypatch, error)

    assert app.run(["model", "ls"]) == code
    assert capsys.readouterr() == ("", f"error: {' '.join(str(error).split())}\n")


def test_errors_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raise_from_ls(monkeypatch, UnknownModel("no such thing"))

    assert app.run(["model", "ls", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": {"type": "UnknownModel", "message": "no such thing"}}


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_from_ls(monkeypatch, ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        app.run(["model", "ls"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raise_from_ls(monkeypatch, KeyboardInterrupt())

    assert app.run(["model", "ls"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "error: No such command 'nix'."),
        (["model", "fetch"], "error: Missing argument"),
        (["model", "ls", "--nix"], "error: No such option: --nix"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_wrong_usage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["model", "fetch", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["type"] == "UsageError"


def test_without_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: kvcomm" in out
    assert err == ""


@pytest.mark.parametrize("command", [[], ["model"], ["model", "fetch"], ["doctor"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*command, "--help"]) == 0
    assert f"Usage: {' '.join(['kvcomm', *command])}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"kvcomm {kvcomm.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--json"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(arguments: list[str]) -> None:
    """As in `kvcomm context ls | head`: no traceback about a broken pipe."""
    command = [sys.executable, "-m", "kvcomm", *arguments]
    with process(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        _, err = started.communicate(timeout=PATIENCE_S)
    assert (started.returncode, err) == (1, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["context", "--help"], ["--version"], ["nonsense"]])
def test_as_a_module_it_is_the_same_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m kvcomm` from anywhere: its name in the help, exit codes, what is said on stderr."""
    code = app.run(arguments)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "kvcomm", *arguments]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, *capsys.readouterr())
    if "--help" in arguments:
        assert f"Usage: {' '.join(['kvcomm', *arguments[:-1]])}" in done.stdout


@pytest.mark.parametrize("way_in", ["main()", "runpy.run_module('kvcomm', run_name='__main__')"])
def test_main_sets_the_wait_policy_and_help_needs_no_torch(way_in: str) -> None:
    """In a process of its own, since this one has both already; by either way in."""
    code = (
        "import os, runpy, sys; from kvcomm.cli.app import main\n"
        "sys.argv = ['kvcomm', '--help']\n"
        f"try: {way_in}\n"
        "except SystemExit as end: print(end.code, os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.splitlines()[-1] == "0 PASSIVE False"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (538_090_408, "538.1 MB"), (2 * 10**12, "2.0 TB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_commands_are_registered() -> None:
    assert model.app in {group.typer_instance for group in app.app.registered_groups}
