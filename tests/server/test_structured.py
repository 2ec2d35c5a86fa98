"""What answers have to look like, by the fields of three servers: over HTTP, on a model that makes nothing up."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from tests.server.conftest import chat, completion
from tests.server.events import DONE, events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "is_tall": {"type": "boolean"}},
    "required": ["name", "is_tall"],
    "additionalProperties": False,
}


def named(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}}


def answer(client: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    body = {**(chat() if url == CHAT else completion()), "max_tokens": 100, **fields}
    response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    text = choice["message"]["content"] if url == CHAT else choice["text"]
    return {"text": text, "finish_reason": choice["finish_reason"]}


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "fields",
    [
        named(PERSON, strict=True),
        named(PERSON),
        named(PERSON | {"uniqueItems": True}, strict=False),
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON), "disable_any_whitespace": True}},
    ],
)
def test_schemas(client: TestClient, url: str, fields: dict[str, Any]) -> None:
    got = answer(client, url, **fields)
    assert got["finish_reason"] == "stop"
    assert jsonschema_rs.is_valid(PERSON, json.loads(got["text"]))


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"structured_outputs": {"regex": "[a-c]{3}"}}, "[a-c]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no", "naïve 漢"]}}, "yes|no|naïve 漢"),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c") "d"'}}, "a[bc]d"),
    ],
)
def test_other_forms(client: TestClient, url: str, fields: dict[str, Any], pattern: str) -> None:
    got = answer(client, url, **fields)
    assert got["finish_reason"] == "stop"
    assert re.fullmatch(pattern, got["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_any_object(client: TestClient, fields: dict[str, Any]) -> None:
    text = answer(client, CHAT, logit_bias={"97": 5.0}, max_tokens=60, **fields)["text"]
    assert text.startswith("{")


def test_text_is_free(client: TestClient) -> None:
    free = answer(client, CHAT)
    assert answer(client, CHAT, response_format={"type": "text"}) == free
    assert answer(client, CHAT, response_format=None, structured_outputs=None, regex=None) == free


def test_streams_say_the_same(client: TestClient) -> None:
    whole = answer(client, CHAT, **named(PERSON))
    response = client.post(CHAT, json={**chat(**named(PERSON)), "max_tokens": 100, "stream": True})
    events = [event for event in events_of(response.text) if event != DONE]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == whole["text"]


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        (named({"type": "array", "uniqueItems": True}), "response_format", "'uniqueItems'"),
        (named({"type": "string", "not": {}}, strict=True), "response_format", "'not'"),
        (named({"type": "strin"}), "response_format", "strin"),
        (named({"type": "integer", "minimum": 2, "maximum": 1}), "response_format", "minimum"),
        (named({"$ref": "#"}), "response_format", "nothing satisfies"),
        (named({"$ref": "https://example.com/it.json"}), "response_format", "example.com"),
        (named({"type": "string", "format": "colour"}), "response_format", "colour"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON"),
        ({"structured_outputs": {"json": "7"}}, "structured_outputs.json", "7"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"grammar": "begin: 'a'"}}, "structured_outputs", "grammar"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar", "empty"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"regex": "(?=a)b"}, "regex", "look-around"),
        ({"regex": "a", "structured_outputs": {"regex": "a"}}, "regex", "only be one of"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unknown"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    client: TestClient, engine: Engine, url: str, fields: dict[str, Any], param: str, word: str
) -> None:
    body = chat(**fields) if url == CHAT else completion(**fields)
    response = client.post(url, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert word in error["message"]
    assert not engine.scheduler.has_work


def test_one_too_dear_is_refused_while_it_runs(client: TestClient) -> None:
    body = chat(regex=r"(\w{1,50}\s?){1,500}", max_tokens=400, temperature=2, seed=1)
    response = client.post(CHAT, json=body)
    assert response.status_code == 400
    assert "cannot go on under" in response.json()["error"]["message"]


def test_contexts_answer_in_the_same_forms(client: TestClient) -> None:
    made = client.post("/v1/contexts", json={"model": "tiny", "messages": [{"role": "system", "content": "Be brief."}]})
    context_id = made.json()["id"]
    got = answer(client, CHAT, context_id=context_id, structured_outputs={"choice": ["yes", "no"]})
    assert got["text"] in ("yes", "no")
    client.delete(f"/v1/contexts/{context_id}")
