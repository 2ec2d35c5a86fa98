"""Bodies: read by workers, refused at the first fault, every list and mapping capped, nothing long sent back."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server import bodies
from kvcomm.server.app import SURFACES
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.errors import MAX_MESSAGE, MAX_PARAM
from kvcomm.server.schemas.cache import WarmRequest
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import MAX_IDS, MAX_LABEL, MAX_MEMBERS, MAX_STOP, MAX_STOPS
from kvcomm.server.schemas.completions import MAX_PROMPTS, CompletionRequest
from kvcomm.server.schemas.contexts import PromptInput
from kvcomm.server.schemas.messages import MAX_CALLS, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from kvcomm.server.schemas.segments import MAX_SEGMENTS
from tests.server.conftest import HELLO, MODEL, chat, completion
from tests.server.test_fields import CHAT, error_of

COMPLETIONS = "/v1/completions"
MESSAGE, TOOL = HELLO[0], {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART, SEGMENT = {"type": "text", "text": "a"}, {"id": "a", "content": "b"}


def said(content: Any) -> dict[str, Any]:
    """A request of one message."""
    return chat(messages=[{"role": "user", "content": content}])


def called(calls: list[Any]) -> dict[str, Any]:
    """A request whose assistant has called tools."""
    return chat(messages=[*HELLO, {"role": "assistant", "tool_calls": calls}])


def named(number: int) -> dict[str, str]:
    """So many members."""
    return {f"k{index}": "v" for index in range(number)}


CAPPED = [
    (ChatRequest, lambda number: chat(messages=[MESSAGE] * number), MAX_MESSAGES, "messages"),
    (ChatRequest, lambda number: said([PART] * number), MAX_PARTS, "content"),
    (ChatRequest, lambda number: called([CALL] * number), MAX_CALLS, "tool_calls"),
    (ChatRequest, lambda number: chat(tools=[TOOL] * number), MAX_TOOLS, "tools"),
    (ChatRequest, lambda number: chat(segments=[SEGMENT] * number), MAX_SEGMENTS, "segments"),
    (ChatRequest, lambda number: chat(stop=["x"] * number), MAX_STOPS, "stop"),
    (ChatRequest, lambda number: chat(stop="x" * number), MAX_STOP, "stop"),
    (ChatRequest, lambda number: chat(metadata=named(number)), 16, "metadata"),
    (ChatRequest, lambda number: chat(metadata={"k": "v" * number}), 512, "metadata"),
    (ChatRequest, lambda number: chat(metadata={"k" * number: "v"}), 64, "metadata"),
    (ChatRequest, lambda number: chat(prediction=named(number)), 16, "prediction"),
    (ChatRequest, lambda number: chat(user="x" * number), MAX_LABEL, "user"),
    (CompletionRequest, lambda number: completion(prompt=["x"] * number), MAX_PROMPTS, "prompt"),
    (CompletionRequest, lambda number: completion(prompt=[[1]] * number), MAX_PROMPTS, "prompt"),
    (CompletionRequest, lambda number: completion(prompt=[1] * number), MAX_IDS, "prompt"),
    (WarmRequest, lambda number: {"model": MODEL, "segments": [SEGMENT] * number}, MAX_SEGMENTS, "segments"),
    (PromptInput, lambda number: {"messages": [MESSAGE] * number}, MAX_MESSAGES, "messages"),
    (PromptInput, lambda number: {"token_ids": [1] * number}, MAX_IDS, "token_ids"),
]


@pytest.mark.parametrize(("model", "make", "most", "field"), CAPPED, ids=lambda value: str(value)[:20])
def test_every_list_and_mapping_is_capped(model: Any, make: Any, most: int, field: str) -> None:
    model.model_validate(make(most))
    with pytest.raises(ValidationError) as refused:
        model.model_validate(make(most + 1))
    (error,) = refused.value.errors()
    assert field in error["loc"]
    assert "at most" in error["msg"]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, chat(messages=[{"role": "wizard"}] * 1000)),
        (ChatRequest, said([{"type": "image"}] * 1000)),
        (ChatRequest, called([{}] * 100)),
        (ChatRequest, chat(tools=[{"type": "function", "function": {"name": "not a name"}}] * 1000)),
        (ChatRequest, chat(stop=[""] * MAX_STOPS)),
        (ChatRequest, chat(segments=[{"id": "", "content": "x"}] * 60)),
        (CompletionRequest, completion(prompt=[-1] * 1000)),
        (CompletionRequest, completion(prompt=["a", *[5] * 100])),
        (CompletionRequest, completion(prompt=[[1], *[[-1]] * 100])),
        (PromptInput, {"token_ids": ["x"] * 1000}),
        (WarmRequest, {"model": MODEL, "segments": [{"id": "", "content": "x"}] * 60}),
        (ChatRequest, chat(**dict.fromkeys(named(MAX_MEMBERS), 1))),
    ],
)
def test_validation_stops_at_the_first_fault(model: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    first = refused.value.errors()[0]["loc"]
    assert all(error["loc"][: len(first) - 1] == first[:-1] for error in refused.value.errors())
    assert refused.value.error_count() <= 4  # fields of one item


def test_unknown_members_are_no_list_of_errors(client: TestClient) -> None:
    adapter = TypeAdapter(ChatRequest)
    with pytest.raises(ValidationError) as refused:
        adapter.validate_python(chat(**dict.fromkeys(named(10_000), 1)))
    assert refused.value.error_count() == 1
    error = error_of(client.post(CHAT, json=chat(**dict.fromkeys(named(10_000), 1))))
    assert str(MAX_MEMBERS) in error["message"]


@pytest.mark.parametrize("ids", [[1.0, 2, 3.0], [1, 2, 3]])
def test_whole_numbers_are_ids(ids: list[float]) -> None:
    prompt = CompletionRequest.model_validate(completion(prompt=ids)).prompts
    assert prompt == [[1, 2, 3]]
    assert all(type(token) is int for token in prompt[0])


def test_every_operation_with_a_body_is_read_by_workers() -> None:
    routes = [route for router in SURFACES for route in router.routes if isinstance(route, APIRoute)]
    with_body = [route for route in routes if route.body_field is not None]
    assert len(with_body) >= 10
    assert {type(route) for route in with_body} == {BodyRoute}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, chat()),
        ("POST", COMPLETIONS, completion()),
        ("POST", "/v1/contexts", {"text": "The quick brown fox"}),
        ("POST", "/v1/cache/warm", {"model": MODEL, "segments": [SEGMENT]}),
        ("POST", "/v1/cache/explain", completion()),
        ("PUT", "/v1/segments/name", {"content": "text"}),
        ("POST", CHAT, {"messages": 5}),
    ],
)
def test_nothing_is_read_or_tokenized_on_the_event_loop(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any
) -> None:
    seen: dict[str, set[int]] = {"read": set(), "encode": set(), "loop": set()}
    read = bodies.read_body
    encode = type(engine.tokenizer)._encode_plus

    def reading(*arguments: Any) -> Any:
        seen["read"].add(threading.get_ident())
        return read(*arguments)

    def encoding(*arguments: Any, **settings: Any) -> Any:
        seen["encode"].add(threading.get_ident())
        return encode(*arguments, **settings)

    json_of = bodies._ReadByWorkers.json

    async def on_loop(self: Any) -> Any:
        seen["loop"].add(threading.get_ident())
        return await json_of(self)

    monkeypatch.setattr(bodies, "read_body", reading)
    monkeypatch.setattr(type(engine.tokenizer), "_encode_plus", encoding)
    monkeypatch.setattr(bodies._ReadByWorkers, "json", on_loop)
    response = client.request(method, path, json=body)
    assert response.status_code in (200, 201, 400), response.text
    assert seen["read"]
    assert bool(seen["encode"]) == (response.status_code != 400)
    assert not (seen["read"] | seen["encode"]) & seen["loop"]


@pytest.mark.parametrize(
    "body",
    [
        chat(model="x" * MAX_LABEL),
        chat(**{"x" * 100_000: 1}),
        chat(messages=[{"role": "x" * 100_000, "content": "a"}]),
        said([{"type": "x" * 100_000}]),
        chat(seed="x" * 100_000),
        chat(metadata={"x" * 100_000: 1}),
        chat(response_format={"type": "x" * 100_000}),
    ],
)
def test_errors_do_not_say_a_body_again(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post(CHAT, json=body)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert len(error["message"]) <= MAX_MESSAGE + 3
    assert len(error["param"] or "") <= MAX_PARAM + 3


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, said("word " * 10_000)),
        ("POST", COMPLETIONS, completion(prompt="word " * 10_000)),
        ("POST", COMPLETIONS, completion(prompt=["a", "word " * 10_000])),
        ("POST", CHAT, chat(segments=[{"id": "a", "content": "word " * 10_000}])),
        ("POST", "/v1/contexts", {"text": "word " * 10_000}),
        ("POST", "/v1/contexts", {"messages": said("word " * 10_000)["messages"]}),
        ("POST", "/v1/cache/warm", {"model": MODEL, "segments": [{"id": "a", "content": "word " * 10_000}]}),
        ("POST", "/v1/cache/explain", completion(prompt="word " * 10_000)),
        ("PUT", "/v1/segments/name", {"content": "word " * 10_000}),
    ],
)
def test_text_that_cannot_fit_is_never_tokenized(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any
) -> None:
    lengths = [0]
    encode = type(engine.tokenizer)._encode_plus

    def encoding(self: Any, text: str, *arguments: Any, **settings: Any) -> Any:
        lengths.append(len(text))
        return encode(self, text, *arguments, **settings)

    monkeypatch.setattr(type(engine.tokenizer), "_encode_plus", encoding)
    error = error_of(client.request(method, path, json=body))
    assert error["code"] == "context_length_exceeded"
    assert max(lengths) < 1000


def test_arguments_of_a_call_are_text_where_they_are_no_sane_json(client: TestClient) -> None:
    """Bug: arguments nested a thousand levels deep ended in a 500."""
    for arguments in ("[" * 1000, '{"a":1,"a":2}', '{"a":' + "9" * 5000 + "}"):
        call = {**CALL, "function": {"name": "f", "arguments": arguments}}
        body = {**called([call]), "max_tokens": 1}
        assert client.post("/v1/cache/explain", json=body).status_code in (200, 400)


def test_a_member_that_comes_twice(client: TestClient) -> None:
    body = json.dumps(chat()).replace('"max_tokens"', '"temperature": 1, "max_tokens"').encode()
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert "'temperature' twice" in error_of(response)["message"]
