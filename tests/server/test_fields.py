"""Fields: what OpenAI documents is accepted or refused by name, anything else is an error; one shape for all errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.conftest import HELLO, chat, completion

CHAT = "/v1/chat/completions"


def error_of(response: Any, status: int = 400) -> dict[str, Any]:
    """The error of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert sorted(error) == ["code", "message", "param", "type"]
    assert response.headers["x-request-id"]
    return dict(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "service_tier": "flex", "store": False},
        {"parallel_tool_calls": True, "verbosity": "low", "reasoning_effort": "low", "prompt_cache_retention": "24h"},
        {"prediction": {"type": "content"}, "modalities": ["text"], "response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tool_choice": "auto", "stop": []},
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "top_p": 0.9, "temperature": 1},
        {"temperature": 1e-30, "seed": 10**30},
        {"max_tokens": 3.0, "seed": 1.0},
    ],
)
def test_documented_fields_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    response = client.post(CHAT, json=chat(**fields))
    assert response.status_code == 200, response.text
    nulls = dict.fromkeys(fields)
    assert client.post(CHAT, json=chat(**nulls)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("function_call", "auto"),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("moderation", {}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: TestClient, field: str, value: Any) -> None:
    error = error_of(client.post(CHAT, json=chat(**{field: value})))
    assert error["param"] == field
    assert error["code"] == "unsupported_value"
    assert error["message"].startswith(field)


@pytest.mark.parametrize(("field", "value"), [("best_of", 2), ("suffix", "x"), ("messages", HELLO)])
def test_plain_completions_refuse_too(client: TestClient, field: str, value: Any) -> None:
    assert error_of(client.post("/v1/completions", json=completion(**{field: value})))["param"] == field


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unknown_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "messages[1]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"prompt_cache_options": {"ttl": "25h"}}, "prompt_cache_options.ttl", "invalid_value"),
        ({"reuse": {"mode": "bold"}}, "reuse.mode", "invalid_value"),
        ({"reuse": {"confidence": 1}}, "reuse.confidence", "invalid_value"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
    ],
)
def test_errors_name_the_field(client: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    error = error_of(client.post(CHAT, json=chat(**fields)))
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


def test_content_that_is_no_text_is_named(client: TestClient) -> None:
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    error = error_of(client.post(CHAT, json=chat(messages=[{"role": "user", "content": content}])))
    assert error["param"] == "messages[0].content[1]"
    assert "image_url" in error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_body"),
        (b"", "invalid_body"),
        (b"null", "invalid_body"),
        (b"[" * 100_000, "invalid_value"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_value"),
        (b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', "invalid_value"),
    ],
)
def test_bodies_that_are_none(client: TestClient, content: bytes, code: str) -> None:
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert error_of(response)["code"] == code


def test_a_body_of_another_type(client: TestClient) -> None:
    response = client.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert "Content-Type" in error_of(response)["message"]


def nested(depth: int) -> dict[str, Any]:
    """A schema so many levels deep."""
    return {"x": nested(depth - 1)} if depth else {}


def test_nesting_is_bounded(client: TestClient) -> None:
    def tools(depth: int) -> list[Any]:
        return [{"type": "function", "function": {"name": "f", "parameters": nested(depth)}}]

    # Body, tools, tool, function and the innermost object are levels too.
    assert error_of(client.post(CHAT, json=chat(tools=tools(58))))["code"] == "context_length_exceeded"
    assert "nested" in error_of(client.post(CHAT, json=chat(tools=tools(60))))["message"]


def test_a_model_that_is_not_here(client: TestClient) -> None:
    error = error_of(client.post(CHAT, json=chat(model="gpt-9")), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert client.get("/v1/models/gpt-9").status_code == 404
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]


def test_what_is_not_there(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    response = client.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
