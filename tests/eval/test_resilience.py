"""`python -m eval.resilience` on a tiny model, and that it sees what it looks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.resilience import questions
from eval.resilience.__main__ import main
from eval.resilience.questions import Asking, Question, leaked_pages
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.limits import threads
from tests.server.live import Live, serving
from tests.tiny import save_tiny_model, tiny_model

CHAT = ({"role": "user", "content": "how many apples are left?"},)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = tiny_model()
    with Engine(made.model, made.tokenizer, config=EngineConfig(page_size=4, pool_tokens=4096)) as engine:
        yield engine


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with serving(engine, ServerSettings(model="tiny", port=0)) as server:
        yield server


@pytest.mark.slow
def test_answers_and_pages_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out" / "run.json"
    command = [
        f"--model={model}",
        "--questions=2",
        "--prefix-len=16",
        "--scenarios=kill,disconnect,racing_saves",
        "--disconnects=12",
        "--json",
        f"--out={out}",
    ]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    values = {figure["id"]: figure["value"] for figure in printed["figures"]}
    assert (values["lost_answers"], values["wrong_answers"], values["leaked_pages"]) == (0, 0, 0)
    assert 0 < values["disconnect_left_in_stream"] <= 12
    assert values["racing_winners"] == 1
    assert (values["kill_asked"], values["disconnect_asked"]) >= (6, 2)
    assert json.loads(out.read_text())["figures"] == printed["figures"]


@pytest.mark.slow
def test_a_hoarder_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "run.json"
    command = ["--questions=2", "--prefix-len=16", "--scenarios=hoarding", "--json", f"--out={out}"]
    assert main([f"--model={model}", *command]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert (values["lost_answers"], values["wrong_answers"], values["leaked_pages"]) == (0, 0, 0)
    assert values["hoarding_asked"] >= 2


def test_wrong_answers_are_seen(live: Live) -> None:
    asking = Asking(live.url, "tiny")
    asking.ask(Question(CHAT, "not what the model says", 50))
    assert asking.found() == (0, 1, 0, 1, 0)


def test_lost_answers_are_seen(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "RETRY_FOR_S", 0.0)
    asking = Asking(live.url, "another model")
    asking.ask(Question(CHAT, "anything", 50))
    assert asking.found(refusals_missed=1) == (2, 0, 0, 1, 0)


def test_leaked_pages_are_seen(live: Live, engine: Engine) -> None:
    with engine.context(list(range(10, 20))):
        assert leaked_pages(live.url) == 3
    engine.cache.clear()
    assert leaked_pages(live.url) == 0


def test_a_client_asks_again_until_there_is_an_answer(live: Live) -> None:
    """Nobody listens at first; then somebody does."""
    asking = Asking("http://127.0.0.1:9", "tiny")
    with threads(lambda: asking.ask(Question(CHAT, "whatever", 50))):
        asking.url = live.url
    assert asking.found().lost_answers == 0


def test_no_such_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--scenarios=kill,flood"])
    assert "flood is none of kill, disconnect" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--model={tmp_path}", f"--out={tmp_path / 'run.json'}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
