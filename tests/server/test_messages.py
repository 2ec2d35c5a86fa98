"""`/v1/messages` in process: the same answers as chat's, blocks both ways, errors in shape, fields or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.anthropic.translation import chat_request
from kvcomm.server.keys import KeyRing
from kvcomm.server.schemas.anthropic import MessagesRequest
from tests.server.conftest import HELLO, MODEL, Keys, MakeClient, chat, roomy_model
from tests.server.test_contexts import ok, said
from tests.server.test_responses import named_events
from tests.server.test_tools import CALL, say
from tests.tiny import TinyModel

CHAT, URL = "/v1/chat/completions", "/v1/messages"
TOOL = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """Tools are described in these prompts."""
    return roomy_model()


def message(**fields: Any) -> dict[str, Any]:
    """A short greedy request."""
    return {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, **fields}


def text_of(answer: dict[str, Any]) -> str:
    """What an answer says."""
    return "".join(block["text"] for block in answer["content"] if block["type"] == "text")


def chat_fields(**fields: Any) -> dict[str, Any]:
    """What a chat request says that comes of a request."""
    request = MessagesRequest.model_validate(message(**fields))
    return chat_request(request).model_dump(exclude_none=True, exclude_defaults=True)


def test_answers_as_chat_does(client: TestClient) -> None:
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    expected = ok(client.post(CHAT, json=chat(messages=[{"role": "system", "content": "Be brief."}, *HELLO])))
    answer = ok(client.post(URL, json=message(system=system)))
    assert text_of(answer) == said(expected)
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    usage = answer["usage"]
    num_prompt = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    assert num_prompt == expected["usage"]["prompt_tokens"]
    assert usage["cache_read_input_tokens"] == num_prompt - 1
    assert usage["output_tokens"] == 6


def test_a_stream_says_the_same(client: TestClient) -> None:
    whole = ok(client.post(URL, json=message()))
    events = named_events(client.post(URL, json=message(stream=True)).text)
    kinds = [each["type"] for each in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(each["delta"]["text"] for each in events[2:-3]) == text_of(whole)
    usage = whole["usage"]
    assert events[0]["message"]["usage"]["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 6


def test_an_answer_goes_on_with_its_beginning(client: TestClient) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "three app"}]
    expected = ok(client.post(CHAT, json=chat(messages=begun, continue_final_message=True)))
    assert text_of(ok(client.post(URL, json=message(messages=begun)))) == said(expected)


def test_breakpoints_say_what_is_created(client: TestClient, engine: Engine) -> None:
    marked = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    first = ok(client.post(URL, json=message(system=[marked])))["usage"]
    again = ok(client.post(URL, json=message(system=[marked])))["usage"]
    assert (first["input_tokens"], first["cache_read_input_tokens"]) == (0, 0)
    assert first["cache_creation_input_tokens"] == first["cache_creation"]["ephemeral_1h_input_tokens"] > 1
    assert again["cache_read_input_tokens"] == first["cache_creation_input_tokens"] - 1
    engine.cache.clear()
    plain = ok(client.post(URL, json=message(system="Be brief.")))["usage"]
    assert (plain["input_tokens"], plain["cache_creation_input_tokens"]) == (first["cache_creation_input_tokens"], 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"tools": [{**TOOL, "cache_control": {"type": "ephemeral", "ttl": "1h"}}, {**TOOL, "name": "g"}]},
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "5m"}},
            {"type": "text", "text": "b", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}]},
    ],
)  # fmt: skip
def test_lifetimes_count_wherever_they_are(fields: dict[str, Any]) -> None:
    assert chat_fields(**fields)["prompt_cache_options"] == {"ttl": "1h"}


def test_stop_sequences(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, "three apples; two pears")
    answer = ok(client.post(URL, json=message(max_tokens=60, stop_sequences=["zz", "; t"])))
    assert text_of(answer) == "three apples"
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "; t")
    answer = ok(client.post(URL, json=message(max_tokens=60, stop_sequences=["zz"])))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)


def test_calls(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, f"Let me see.\n{CALL}")
    whole = ok(client.post(URL, json=message(max_tokens=200, tools=[TOOL])))
    text, call = whole["content"]
    assert (text["text"], whole["stop_reason"]) == ("Let me see.", "tool_use")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Köln 🙂"})
    events = named_events(client.post(URL, json=message(max_tokens=200, tools=[TOOL], stream=True)).text)
    (start,) = (each for each in events if each["type"] == "content_block_start" and each["index"] == 1)
    assert (start["content_block"]["name"], start["content_block"]["input"]) == ("weather", {})
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta" and each["index"] == 1]
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == call["input"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    follows = [*HELLO, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
    ok(client.post(URL, json=message(messages=follows, tools=[TOOL])))


def test_a_call_that_is_cut(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "when": "tomorrow')
    num = len(engine.tokenizer('<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "wh')["input_ids"])
    answer = ok(client.post(URL, json=message(max_tokens=num, tools=[TOOL])))
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][-1]["input"] == {"city": "Bonn"}


def test_blocks_become_messages() -> None:
    messages = chat_fields(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [
                {"type": "redacted_thinking", "data": "x"},
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"x": "ü"}},
                {"type": "tool_use", "id": "b", "name": "f", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "1"},
                {"type": "tool_result", "tool_use_id": "b", "is_error": True,
                 "content": [{"type": "text", "text": "no"}]},
                {"type": "tool_result", "tool_use_id": "c"},
                {"type": "text", "text": "and?"}]},
            {"role": "system", "content": "Go on."},
        ]
    )["messages"]  # fmt: skip
    assert [each["role"] for each in messages] == ["user", "assistant", "tool", "tool", "tool", "user", "system"]
    assert messages[1]["content"] == [{"type": "text", "text": "I look."}]
    assert messages[1]["reasoning_content"] == "Hm."
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == ['{"x": "ü"}', "{}"]
    assert [each["tool_call_id"] for each in messages[2:5]] == ["a", "b", "c"]
    assert messages[3]["content"] == [{"type": "text", "text": "Error: "}, {"type": "text", "text": "no"}]
    assert (messages[2]["content"], messages[4]["content"]) == ("1", "")


@pytest.mark.parametrize(
    ("choice", "expected", "is_parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, None),
    ],
)
def test_choices_of_tools(choice: dict[str, Any], expected: Any, is_parallel: bool | None) -> None:
    fields = chat_fields(tools=[TOOL], tool_choice=choice)
    assert fields["tool_choice"] == expected
    assert fields.get("parallel_tool_calls") is is_parallel
    function = fields["tools"][0]["function"]
    assert function == {"name": "weather", "description": "of a city", "parameters": TOOL["input_schema"]}


@pytest.mark.parametrize(
    "fields",
    [
        {
            "metadata": {"user_id": "me"},
            "service_tier": "auto",
            "inference_geo": "eu",
            "diagnostics": {},
            "speed": "fast",
        },
        {"top_k": 5, "top_p": 0.9, "stop_sequences": [], "cache_control": {"type": "ephemeral"}},
        {"tools": [], "tool_choice": {"type": "auto"}, "mcp_servers": []},
        {"seed": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "cache_salt": "s", "reuse": {}},
        {"output_config": {"effort": "low"}, "thinking": {"type": "enabled", "budget_tokens": 1024}},
    ],
)
def test_documented_fields_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    answer = client.post(f"{URL}?beta=true", json=message(**fields), headers={"anthropic-version": "2023-06-01"})
    assert answer.status_code == 200, answer.text
    assert client.post(URL, json=message(**dict.fromkeys(fields))).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a",
                                                     "content": [{"type": "image", "source": {}}]}]}]},
         "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use", "id": "a"}]}]},
         "messages[0].content[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"container": "c"}, "container"),
        ({"context_management": {}}, "context_management"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ],
)  # fmt: skip
def test_errors_name_the_field_in_anthropics_shape(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post(URL, json=message(**fields))
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["param"] == param
    assert body["request_id"] == answer.headers["x-request-id"]


def test_threads_are_refused_as_the_client_understands_it(client: TestClient) -> None:
    """Its tool runner asks for one, and goes on without where it reads this code."""
    error = client.post(URL, json=message(thread={"type": "create"})).json()["error"]
    assert (error["param"], error["details"]) == ("thread", {"error_code": "thread_unsupported_request"})


def test_errors_from_everywhere_have_that_shape(
    client: TestClient, make_client: MakeClient, keys: Keys, key_file: Any
) -> None:
    guarded = make_client(keys=KeyRing(key_file), max_body_bytes=200)
    for answer, status, kind in (
        (client.post(URL, json=message(model="gpt-9")), 404, "not_found_error"),
        (client.post(URL, content=b"{"), 400, "invalid_request_error"),
        (client.get(URL), 405, "invalid_request_error"),
        (client.get(f"{URL}/nothing"), 404, "not_found_error"),
        (guarded.post(URL, json=message()), 401, "authentication_error"),
        (guarded.post(URL, json=message(), headers={"x-api-key": keys["admin"]}), 403, "permission_error"),
        (
            guarded.post(URL, json=message(system="a" * 300), headers={"x-api-key": keys["ann"]}),
            413,
            "request_too_large",
        ),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), answer.text
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "code" in client.post("/v1/messagesx", json={}).json()["error"]
    assert "type" not in client.post("/v1/messagesx", json={}).json()


def test_keys_come_in_either_header(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    client = make_client(keys=KeyRing(key_file))
    for headers in ({"x-api-key": keys["ann"]}, keys.header("ann"), {**keys.header("ann"), "x-api-key": "wrong"}):
        assert client.post(URL, json=message(), headers=headers).status_code == 200
        assert client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": "Basic x"}):
        assert client.post(URL, json=message(), headers=headers).status_code == 401
    assert client.get("/metrics", headers={"x-api-key": keys["ann"]}).status_code == 403


def test_tokens_are_counted(client: TestClient) -> None:
    body = {"model": MODEL, "messages": HELLO, "system": "Be brief.", "tools": [TOOL]}
    counted = ok(client.post(f"{URL}/count_tokens", json=body))
    usage = ok(client.post(URL, json=message(**body)))["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    refused = client.post(f"{URL}/count_tokens", json={**body, "model": "gpt-9"})
    assert refused.json()["error"]["type"] == "not_found_error"
