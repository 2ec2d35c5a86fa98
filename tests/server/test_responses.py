"""`/v1/responses` in process: the same answers as chat's, items both ways, and fields served or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.server.responses.translation import chat_request, items_of
from kvcomm.server.schemas.responses import ResponseRequest
from tests.server.conftest import MODEL, chat
from tests.server.test_contexts import error_of, ok, said

CHAT, URL = "/v1/chat/completions", "/v1/responses"
QUESTION = "how many apples are left?"


def response(**fields: Any) -> dict[str, Any]:
    """A short greedy request."""
    return {"model": MODEL, "input": QUESTION, "max_output_tokens": 6, "temperature": 0, **fields}


def text_of(answer: dict[str, Any]) -> str:
    """What a response says."""
    return "".join(part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"])


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        values = json.loads(data.removeprefix("data: "))
        assert name == f"event: {values['type']}"
        events.append(values)
    return events


def chat_fields(**fields: Any) -> dict[str, Any]:
    """What a chat request says that comes of a request."""
    request = ResponseRequest.model_validate(response(**fields))
    return chat_request(request, items_of(request)).model_dump(exclude_none=True, exclude_defaults=True)


def test_answers_as_chat_does(client: TestClient) -> None:
    expected = ok(client.post(CHAT, json=chat(messages=[{"role": "system", "content": "Be brief."}, *asked()])))
    answer = ok(client.post(URL, json=response(instructions="Be brief.", metadata={"a": "b"}, store=False)))
    assert text_of(answer) == said(expected)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["store"], answer["metadata"], answer["instructions"]) == (False, {"a": "b"}, "Be brief.")
    usage = answer["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (expected["usage"]["prompt_tokens"], 6)
    assert usage["input_tokens_details"]["cached_tokens"] == usage["cached_prefix_tokens"] > 0


def asked() -> list[dict[str, Any]]:
    """The question as a chat message."""
    return [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("store", [None, False])
def test_a_stream_says_the_same(client: TestClient, store: bool | None) -> None:
    whole = ok(client.post(URL, json=response(store=store)))
    events = named_events(client.post(URL, json=response(store=store, stream=True)).text)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    kinds = [each["type"] for each in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    final = events[-1]["response"]
    assert {each["response"]["id"] for each in events if "response" in each} == {final["id"]}
    assert (
        text_of(final) == text_of(whole) == "".join(each["delta"] for each in events if each["type"].endswith("delta"))
    )


def test_log_probabilities_cover_the_text(client: TestClient) -> None:
    expected = ok(client.post(CHAT, json=chat(logprobs=True, top_logprobs=2)))["choices"][0]["logprobs"]["content"]
    answer = ok(client.post(URL, json=response(top_logprobs=2)))
    told = answer["output"][0]["content"][0]["logprobs"]
    assert [each["token"] for each in told] == [each["token"] for each in expected]
    for each, other in zip(told, expected, strict=True):
        assert each["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert [top["token"] for top in each["top_logprobs"]] == [top["token"] for top in other["top_logprobs"]]
    events = named_events(client.post(URL, json=response(top_logprobs=2, stream=True)).text)
    streamed = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [each["token"] for each in streamed] == [each["token"] for each in expected]
    plain = ok(client.post(URL, json=response()))
    assert plain["output"][0]["content"][0]["logprobs"] == []


def test_items_become_messages() -> None:
    fields = chat_fields(
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "f", "arguments": '{"x": 1}', "status": "completed"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "developer", "content": "now"},
        ],
        instructions="Be brief.",
    )  # fmt: skip
    messages = fields["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool", "developer"]
    assert messages[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages[2]["content"] == [{"type": "text", "text": "I look"}]
    assert messages[2]["reasoning_content"] == "Hm."
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["c1", "c2"]
    assert messages[2]["tool_calls"][1]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (messages[3]["tool_call_id"], messages[3]["content"]) == ("c1", "1")


def test_two_answers_in_a_row_stay_two() -> None:
    items = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert [message["content"] for message in chat_fields(input=items)["messages"]] == ["a", "b"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "safety_identifier": "x", "service_tier": "flex", "prompt_cache_key": "k", "max_tool_calls": 3},
        {"truncation": "auto", "include": ["reasoning.encrypted_content"], "background": False, "seed": 1},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}, "reasoning": {"effort": "low", "summary": "auto"}},
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "top_p": 0.9, "stop": ["zz"]},
        {"prompt_cache_options": {"ttl": "30m"}, "prompt_cache_retention": "24h", "tool_choice": "auto", "tools": []},
        {"reuse": {"mode": "exact"}, "cache_salt": "s"},
        {"stream_options": {"include_obfuscation": False}, "stream": True},
    ],
)
def test_documented_fields_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post(URL, json=response(**fields)).status_code == 200
    assert client.post(URL, json=response(**dict.fromkeys(fields))).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"background": True}, "background", "unsupported_value"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_value"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0]", "unsupported_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "unsupported_value"),
        ({"input": [{"type": "computer_call_output", "call_id": "x"}]}, "input[0]", "unsupported_value"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]},
         "input[0].arguments", "missing_required_parameter"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}},
         "text.format.schema", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_errors_name_the_field(client: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    answer = client.post(URL, json=response(**fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_errors_of_chat_come_in_this_apis_names(client: TestClient) -> None:
    answer = client.post(URL, json=response(model="gpt-9"))
    assert error_of(answer) == (404, "model_not_found")
    too_long = client.post(URL, json=response(input="apple " * 2000))
    assert error_of(too_long) == (400, "context_length_exceeded")


def test_tokens_are_counted(client: TestClient) -> None:
    answer = ok(client.post(URL, json=response(instructions="Be brief.")))
    body = {"model": MODEL, "input": QUESTION, "instructions": "Be brief."}
    counted = ok(client.post(f"{URL}/input_tokens", json=body))
    assert counted == {"object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]}
    after = {"model": MODEL, "input": "why?", "instructions": "Be brief.", "previous_response_id": answer["id"]}
    again = ok(client.post(URL, json=response(**after)))
    assert ok(client.post(f"{URL}/input_tokens", json=after))["input_tokens"] == again["usage"]["input_tokens"]
