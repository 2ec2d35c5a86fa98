"""The official OpenAI client's Responses API, unchanged, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kvcomm.engine.engine import Engine
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import MODEL, roomy_model
from tests.server.live import Live
from tests.server.test_tools import CALL, say
from tests.tiny import TinyModel

ASKED: dict[str, Any] = {
    "model": MODEL,
    "input": "how many apples are left?",
    "max_output_tokens": 6,
    "temperature": 0,
}
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """Tools are described in these prompts."""
    return roomy_model()


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The client as a user makes it."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


def test_a_conversation(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED, instructions="Be brief.")
    assert first.output_text
    assert first.usage is not None
    second = client.responses.create(
        **{**ASKED, "input": "why?"}, instructions="Be brief.", previous_response_id=first.id
    )
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert client.responses.retrieve(second.id) == second
    items = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in items] == ["message", "message", "message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        client.responses.retrieve(first.id)
    assert gone.value.code == "response_not_found"
    counted = client.responses.input_tokens.count(model=MODEL, input=ASKED["input"], instructions="Be brief.")
    assert counted.input_tokens == first.usage.input_tokens


def test_a_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == whole.output_text


def test_a_tool_is_called_and_its_result_comes_back(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {**ASKED, "max_output_tokens": 200, "tools": [TOOL]}
    with monkeypatch.context() as patch:
        say(patch, engine, f"Let me see.\n{CALL}")
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            final = stream.get_final_response()
    for answer in (whole, final):
        text, call = answer.output
        assert (text.type, call.type) == ("message", "function_call")
        assert (call.name, call.arguments) == ("weather", '{"city": "Köln 🙂"}')  # type: ignore[union-attr]  # it is a call
    result: Any = {"type": "function_call_output", "call_id": whole.output[1].call_id, "output": "sunny"}  # type: ignore[union-attr]  # it is a call
    asked = {**ASKED, "tools": [TOOL]}
    for follows in (
        {**asked, "input": [result], "previous_response_id": whole.id},
        {**asked, "input": [{"role": "user", "content": ASKED["input"]}, *whole.output, result]},
    ):
        assert client.responses.create(**follows).output[0].type == "message"


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "count", "schema": schema, "strict": True}}
    answer = client.responses.create(**{**ASKED, "max_output_tokens": 60, "text": form})
    assert json.loads(answer.output_text)["n"] in (1, 2)
    assert answer.status == "completed"


def test_what_is_left_early_is_not_stored(client: openai.OpenAI, live: Live, engine: Engine) -> None:
    asked = {**ASKED, "max_output_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.responses.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    assert live.state.contexts.of(live.state.tenants.get()).nodes == []
    engine.check_integrity()


def test_errors_become_the_clients(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        client.responses.create(**{**ASKED, "model": "gpt-9"})
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(**ASKED, previous_response_id="resp_" + "0" * 24)
    assert (missing.value.code, missing.value.param) == ("previous_response_not_found", "previous_response_id")


def test_an_error_in_the_middle_of_a_stream(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.scheduler._runner.forward
    num_passes = [0]

    def failing(*arguments: object, **settings: object) -> object:
        num_passes[0] += 1
        if num_passes[0] > 8:
            raise ZeroDivisionError("secret detail")
        return forward(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.scheduler._runner, "forward", failing)
    asked = {**ASKED, "max_output_tokens": 50, "extra_body": {"ignore_eos": True}}
    events = list(client.responses.create(**asked, stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert "secret" not in last.response.error.message
