"""`kvcomm context --server`: the same verbs on the contexts of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.cli.remote_context import RemoteContexts
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.server.live import Live, serving
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server with a tiny model."""
    tiny = tiny_model()
    config = EngineConfig(page_size=4, pool_tokens=4096)
    with (
        Engine(tiny.model, tiny.tokenizer, config=config) as engine,
        serving(engine, ServerSettings(model="tiny", port=0)) as made,
    ):
        yield made


@pytest.fixture
def kvcomm(live: Live, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a context command on the server; returns its JSON, or its error."""

    def call(*arguments: str, code: int = 0) -> Any:
        assert run(["context", *arguments, "--server", live.url, "--json"]) == code
        captured = capsys.readouterr()
        return json.loads(captured.err if code else captured.out)

    yield call
    live.state.contexts.close()


def test_the_verbs(kvcomm: Any) -> None:
    base = kvcomm("create", "base", "--text", "The quick brown fox")
    assert kvcomm("fork", "base", "left")["parent"] == base["id"]
    grown = kvcomm("extend", "left", "--text", " jumps over")
    assert grown["own_tokens"] == grown["tokens"] - base["tokens"] > 0
    assert kvcomm("extend", "left", "--text", " the lazy dog", "--save-as", "more")["parent"] == grown["id"]
    answer = kvcomm("generate", "left", "--max-new-tokens", "4", "--temperature", "0", "--save-as", "answered")
    again = kvcomm("generate", "left", "--max-new-tokens", "4", "--temperature", "0")
    assert answer["choices"] == again["choices"]
    assert answer["usage"]["prompt_tokens"] == grown["tokens"]
    listed = {each["name"]: each for each in kvcomm("ls")["contexts"]}
    assert list(listed) == ["base", "left", "more", "answered"]
    assert listed["answered"]["tokens"] >= grown["tokens"]
    assert kvcomm("create", "behind", "--text", "x", "--extend-from", "base")["parent"] == base["id"]
    assert [each["name"] for each in kvcomm("show", "more")["contexts"]] == ["base", "left", "more"]
    assert [each["name"] for each in kvcomm("rm", "base", "left")["removed"]] == ["base", "left"]
    assert {each["parent"] for each in kvcomm("ls")["contexts"]} == {None}


def test_the_callers_settings_stay_as_they_are(live: Live, kvcomm: Any) -> None:
    kvcomm("create", "base", "--text", "The quick brown fox")
    sampling = {"max_new_tokens": 3, "temperature": 0.0}
    answer = RemoteContexts(live.url, None).generate("base", sampling, (), None, lambda _: None).value
    assert answer["usage"]["completion_tokens"] == 3
    assert sampling == {"max_new_tokens": 3, "temperature": 0.0}


def test_for_people(live: Live, kvcomm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kvcomm("create", "base", "--text", "The quick brown fox")
    kvcomm("fork", "base", "left")
    for arguments in (["ls"], ["show"], ["generate", "left", "--max-new-tokens", "2"]):
        assert run(["context", *arguments, "--server", live.url]) == 0
        assert capsys.readouterr().out.strip()


def test_names_that_say_nothing(kvcomm: Any) -> None:
    assert "'nobody'" in kvcomm("fork", "nobody", "x", code=2)["error"]["message"]
    for _ in range(2):
        kvcomm("create", "twin", "--text", "x")
    assert "give one's id: ctx_" in kvcomm("rm", "twin", code=2)["error"]["message"]
    assert "--segment" in kvcomm("create", "a", "--segment", "tools", code=2)["error"]["message"]
    assert "--text" in kvcomm("create", "a", code=2)["error"]["message"]
