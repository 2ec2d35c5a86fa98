"""`python -m eval.clients`: what is counted as what, on a tiny model and with clients that are made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.clients import __main__ as clients
from eval.clients import likelihoods, running
from eval.clients.running import CLIENTS, HELLOS, Check, Hello, Interpreter, place_of
from eval.clients.schemas import SCHEMAS, error_of
from kvcomm import Engine
from kvcomm.errors import InvalidRequest

SCRIPT = """
from checking import main

def tool(server): assert server.url.endswith("/v1"), server
def tool_streamed(server): print("noise"); return [server.model, server.tokenizer]
def structured(server): raise ValueError("no object")

main(tool, tool_streamed, structured)
"""


@pytest.fixture
def here() -> Interpreter:
    """The interpreter of the tests."""
    return Interpreter(Path(sys.executable))


def test_there_is_a_hello_for_every_client() -> None:
    assert {file.stem for file in HELLOS.glob("with_*.py")} == {f"with_{name.replace('-', '_')}" for name in CLIENTS}


def test_checks_of_a_script(here: Interpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_openai.py").write_text(SCRIPT)
    (tmp_path / "checking.py").write_text((HELLOS / "checking.py").read_text())
    monkeypatch.setattr(running, "HELLOS", tmp_path)
    hello = here.hello("openai", "http://127.0.0.1:1", "tiny", tmp_path)
    assert hello.checks == [
        Check("tool", None),
        Check("tool_streamed", None, ["tiny", str(tmp_path)]),
        Check("structured", "ValueError: no object"),
    ]
    assert hello.works("tool")
    assert not hello.works("structured")


def test_a_script_that_breaks_does_not_work(here: Interpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_openai.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(running, "HELLOS", tmp_path)
    hello = here.hello("openai", "http://127.0.0.1:1", "tiny", tmp_path)
    assert not hello.works("tool")
    assert hello.checks[0].error == "no such thing"


def test_what_has_no_checks_of_a_kind_does_not_work() -> None:
    assert not Hello("lm-eval", {}, [Check("tool", None)]).works("structured")


def test_a_client_runs_where_it_is_installed(here: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLIENTS, "nothing", ("a-package-that-nobody-has",))  # type: ignore[arg-type]
    assert place_of("nothing", [here]) is None
    assert place_of("openai", [here]) is here
    with pytest.raises(InvalidRequest, match="does not run"):
        Interpreter(Path("/no/such/python")).has("openai")


@pytest.mark.usefixtures("capsys")
def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert clients.main(["--client", "cobol"]) == 1
    assert "--client 'cobol': there are openai, anthropic" in capsys.readouterr().err
    assert clients.main(["--parts", "clients,luck"]) == 1
    assert "--parts 'luck'" in capsys.readouterr().err


def test_the_schemas_are_forty_valid_ones() -> None:
    from jsonschema import Draft202012Validator

    assert len(SCHEMAS) == 40
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("name", "text", "is_valid"),
    [
        ("integer", '{"count": 3}', True),
        ("integer", '{"count": "3"}', False),
        ("integer", '{"count": 3', False),
        ("pattern", '{"code": "AB-123"}', True),
        ("pattern", '{"code": "AB-12"}', False),
        ("date", '{"day": "2026-02-28"}', True),
        ("date", '{"day": "2026-02-30"}', False),
    ],
)
def test_answers_are_validated(name: str, text: str, is_valid: bool) -> None:
    assert (error_of(SCHEMAS[name], text) is None) is is_valid


def test_loglikelihoods_add_up(tiny_folder: Path) -> None:
    """Split anywhere, a text's parts have the log-likelihood of the whole; white space goes to what follows."""
    with Engine.load(str(tiny_folder)) as engine:

        def own(context: str, continuation: str) -> float:
            return likelihoods.own_loglikelihood(engine, {"context": context, "continuation": continuation})

        assert own("The ", "quick") == own("The", " quick")
        asked = {"context": "The", "continuation": " quick", "loglikelihood": own("The", " quick") - 0.5}
        assert likelihoods.errors_of(engine, [asked]) == [pytest.approx(0.5)]


@pytest.mark.slow
@pytest.mark.usefixtures("capsys")
def test_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    """The official client, all parts; a tiny model's answers to schemas are as valid as any."""
    out = tmp_path / "run.json"
    arguments = ["--model", str(tiny_folder), "--client", "openai", "--answers=10", "--repeats=2", "--out", str(out)]
    assert clients.main([*arguments, "--parts=clients,schemas,overhead"]) == 0
    saved = json.loads(out.read_text())
    figures = {figure["id"]: figure["value"] for figure in saved["figures"]}
    assert saved["config"]["clients"]["openai"]["errors"] == dict.fromkeys(
        saved["config"]["clients"]["openai"]["errors"]
    )
    assert figures["clients_installed"] == figures["clients_tools"] == figures["clients_structured"] == 1
    assert saved["config"]["invalid"] == []
    assert figures["schema_valid"] == 1
    assert figures["grammar_overhead"] > 0
