"""Anthropic's official client, unchanged, against a real server: whole, streamed, tools, counts, errors, keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import beta_tool

from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S
from tests.server.conftest import MODEL, roomy_model
from tests.server.live import Live, serving
from tests.server.test_messages import TOOL
from tests.server.test_tools import CALL, say
from tests.tiny import TinyModel

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 6,
    "extra_body": {"temperature": 0},  # a field that the client does not know any more
    "messages": [{"role": "user", "content": "how many apples are left?"}],
}


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """Tools are described in these prompts."""
    return roomy_model()


def client_of(live: Live, key: str = "unused") -> anthropic.Anthropic:
    """The client as a user makes it."""
    return anthropic.Anthropic(base_url=live.url, api_key=key, timeout=PATIENCE_S, max_retries=0)


def test_whole_and_streamed(live: Live) -> None:
    with client_of(live) as client:
        whole = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == whole.content[0].text  # type: ignore[union-attr]  # it is a text
        assert [block.type for block in final.content] == ["text"]
        assert (final.stop_reason, whole.stop_reason) == ("max_tokens", "max_tokens")
        assert (
            final.usage.cache_read_input_tokens
            == client.messages.count_tokens(model=MODEL, messages=ASKED["messages"]).input_tokens - 1
        )
        assert final.usage.output_tokens == 6
        events = [each.type for each in client.messages.create(**ASKED, stream=True)]
        assert (events[0], events[-1]) == ("message_start", "message_stop")
        assert client.beta.messages.create(**ASKED).content[0].type == "text"
        assert [model.id for model in client.models.list()] == [MODEL]


def test_a_tool_is_called_and_its_result_comes_back(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**ASKED, "max_tokens": 200, "tools": [TOOL]}
    with client_of(live) as client:
        with monkeypatch.context() as patch:
            say(patch, engine, f"Let me see.\n{CALL}")
            whole = client.messages.create(**asked)
            with client.messages.stream(**asked) as stream:
                final = stream.get_final_message()
        for answer in (whole, final):
            assert answer.stop_reason == "tool_use"
            call = answer.content[-1]
            assert call.type == "tool_use"
            assert (call.name, call.input) == ("weather", {"city": "Köln 🙂"})
        result = {"type": "tool_result", "tool_use_id": whole.content[-1].id, "content": "sunny"}  # type: ignore[union-attr]  # it is a call
        follows = [*ASKED["messages"], {"role": "assistant", "content": whole.content}]
        answer = client.messages.create(
            **{**asked, "max_tokens": 6, "messages": [*follows, {"role": "user", "content": [result]}]}
        )
        assert answer.content[0].type == "text"


def test_structured_output(live: Live) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    asked = {**ASKED, "max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    with client_of(live) as client:
        answer = client.messages.create(**asked)
    assert json.loads(answer.content[0].text)["n"] in (1, 2)  # type: ignore[union-attr]  # it is a text


def test_a_tool_that_has_to_be_called(live: Live) -> None:
    asked = {**ASKED, "max_tokens": 120, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}
    with client_of(live) as client:
        answer = client.messages.create(**asked)
    call = answer.content[-1]
    assert call.type == "tool_use"
    assert call.name == "weather"


@beta_tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: which one.
    """
    return f"It is sunny in {city}."


def test_the_tool_runner_calls_it(live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, CALL)
    with client_of(live) as client:
        runner = client.beta.messages.tool_runner(
            model=MODEL, max_tokens=200, tools=[weather], messages=ASKED["messages"], max_iterations=2
        )
        answers = list(runner)
    assert [answer.stop_reason for answer in answers] == ["tool_use", "tool_use"]


def test_errors_become_the_clients(live: Live) -> None:
    with client_of(live) as client:
        with pytest.raises(anthropic.NotFoundError, match="no model 'claude-9'") as missing:
            client.messages.create(**{**ASKED, "model": "claude-9"})
        assert missing.value.type == "not_found_error"
        assert missing.value.request_id or missing.value.body
        image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
        with pytest.raises(anthropic.BadRequestError, match="image"):
            client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": [image]}]})


def test_keys(engine: Engine, key_file: Path) -> None:
    key = add_key(key_file, "ann")
    with serving(engine, ServerSettings(model=MODEL, port=0), keys=KeyRing(key_file)) as live:
        with client_of(live, key) as client:
            assert client.messages.create(**ASKED).content
        with client_of(live, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**ASKED)


def test_an_error_in_the_middle_of_a_stream(live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.scheduler._runner.forward
    num_passes = [0]

    def failing(*arguments: object, **settings: object) -> object:
        num_passes[0] += 1
        if num_passes[0] > 8:
            raise ZeroDivisionError("secret detail")
        return forward(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.scheduler._runner, "forward", failing)
    asked = {**ASKED, "max_tokens": 50, "extra_body": {"ignore_eos": True}}
    with client_of(live) as client, pytest.raises(anthropic.APIError, match="failed inside the server") as failed:
        list(client.messages.create(**asked, stream=True))
    assert "secret" not in str(failed.value)
