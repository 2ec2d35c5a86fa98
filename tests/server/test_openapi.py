"""The OpenAPI document says what the server does: operations, statuses, security, and schemas that match answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator
from starlette.testclient import TestClient

from kvcomm.server.openapi import numbers_below
from tests.server.conftest import chat, completion


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    """The document."""
    return dict(client.get("/openapi.json").json())


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    """A validator of one of its schemas."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


def test_every_operation_is_named_and_422_is_for_boundaries(document: dict[str, Any]) -> None:
    ids = []
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            refused = operation["responses"].get("422", {"description": "boundary"})["description"]
            assert "boundary" in refused.lower(), path
            keys = [{"HTTPBearer": []}, *([{"APIKeyHeader": []}] if path.startswith("/v1/messages") else [])]
            assert operation.get("security") == (None if path in OPEN else keys), path
            if path not in OPEN:
                assert {"401", "403"} <= set(operation["responses"]), path
    assert len(set(ids)) == len(ids)


OPEN = {"/health", "/ready", "/version", "/ui"}


def test_no_reference_dangles(document: dict[str, Any]) -> None:
    names = set(document["components"]["schemas"])

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"].rsplit("/", 1)[1]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(document) == names
    assert [name for name in names if "__" in name] == []  # where two are called alike, modules get into the names


@pytest.mark.parametrize(
    ("path", "request_schema", "response_schema", "body"),
    [
        (
            "/v1/chat/completions",
            "ChatRequest",
            "ChatCompletion",
            chat(logprobs=True, top_logprobs=1, n=2, include_plan=True),
        ),
        ("/v1/completions", "CompletionRequest", "TextCompletion", completion(logprobs=1, prompt=["a", "b"])),
    ],
)
def test_answers_match_their_schema(
    client: TestClient, document: dict[str, Any], path: str, request_schema: str, response_schema: str, body: Any
) -> None:
    validator(document, request_schema).validate(body)
    validator(document, response_schema).validate(client.post(path, json=body).json())
    validator(document, "ErrorResponse").validate(client.post(path, json={}).json())


@pytest.mark.parametrize(
    "fields",
    [
        {"nonsense": 1},
        {"temperature": "1"},
        {"temperature": 2.1},
        {"presence_penalty": 2.1},
        {"response_format": {"type": "json_array"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"json_object": False}},
        {"top_logprobs": 1},
        {"stream_options": {}},
        {"stream_options": {}, "stream": False},
        {"n": 17},
        {"stop": [""]},
        {"messages": [{"role": "user", "content": []}]},
        {"prompt_cache_options": {"ttl": "25h"}},
        {"reuse": {"confidence": 1}},
        {"include_plan": 1},
    ],
)
def test_what_is_refused_is_outside_the_schema(
    client: TestClient, document: dict[str, Any], fields: dict[str, Any]
) -> None:
    body = chat(**fields)
    assert not validator(document, "ChatRequest").is_valid(body)
    assert client.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_the_document_does_not_say_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/chat/completions", json=chat(**fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@given(limit=st.integers(1, 300_000), number=st.integers(0, 400_000))
def test_numbers_below_a_limit(limit: int, number: int) -> None:
    pattern = re.compile(numbers_below(limit))
    for each in (number, limit - 1, limit):
        assert bool(pattern.fullmatch(str(each))) == (each < limit)
    assert not pattern.fullmatch("0" + str(number))
    assert not pattern.fullmatch("")
