"""Contexts over HTTP: what is answered on one equals a request that sends everything; nobody sees another's."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing
from tests.server.conftest import HELLO, Keys, MakeClient, chat, completion

CHAT, URL = "/v1/chat/completions", "/v1/contexts"
MORE = [{"role": "user", "content": "and how many <|im_end|> pears?"}]


def made(client: TestClient, **fields: Any) -> dict[str, Any]:
    """A new context."""
    answer = client.post(URL, json=fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def ok(answer: Any) -> dict[str, Any]:
    """The body of a success."""
    assert answer.status_code in (200, 201), answer.text
    return dict(answer.json())


def error_of(answer: Any) -> tuple[int, str]:
    """Status and code of an error."""
    return answer.status_code, answer.json()["error"]["code"]


def said(answer: dict[str, Any]) -> str:
    """What the model says."""
    return str(answer["choices"][0]["message"]["content"])


def test_messages_on_a_context_are_answered_as_if_all_had_been_sent(client: TestClient) -> None:
    context = made(client, messages=HELLO, name="base")
    expected = ok(client.post(CHAT, json=chat(messages=[*HELLO, *MORE], max_tokens=12)))
    client.app.state.kvcomm.engine.cache.clear()  # type: ignore[attr-defined]  # the app is ours
    answer = ok(client.post(CHAT, json=chat(messages=MORE, context_id=context["id"], max_tokens=12)))
    assert said(answer) == said(expected)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert usage["computed_tokens"] == usage["prompt_tokens"] - context["tokens"]
    assert ok(client.get(f"{URL}/{context['id']}"))["tokens"] == context["tokens"]


def test_what_is_stored_goes_on_as_one_conversation(client: TestClient, engine: Engine) -> None:
    context = made(client, messages=HELLO)
    where = {"context_id": context["id"], "store": True}
    first = ok(client.post(CHAT, json=chat(messages=[], **where)))
    second = ok(client.post(CHAT, json=chat(messages=MORE, **where)))
    node = client.app.state.kvcomm.contexts.of(client.app.state.kvcomm.tenants.get()).nodes[0]  # type: ignore[attr-defined]
    text = engine.texts.decode(node.context.tokens)
    answers = [{"role": "assistant", "content": said(each)} for each in (first, second)]
    expected = engine.tokenizer.apply_chat_template([*HELLO, answers[0], *MORE, answers[1]], tokenize=False)
    assert text == str(expected).removesuffix("<|im_end|>\n")
    assert second["usage"]["computed_tokens"] < second["usage"]["prompt_tokens"] - context["tokens"]
    assert ok(client.get(f"{URL}/{context['id']}"))["tokens"] == len(node.context.tokens)


def test_text_and_ids_are_continued_as_they_are(client: TestClient, engine: Engine) -> None:
    text, more = "The quick brown fox", " jumps over the"
    ids = list(engine.segment(text).token_ids)
    for source in ({"text": text}, {"token_ids": ids}):
        context = made(client, **source)
        expected = ok(
            client.post("/v1/completions", json=completion(prompt=ids + list(engine.segment(more).token_ids)))
        )
        fields = completion(prompt=more, context_id=context["id"])
        assert ok(client.post("/v1/completions", json=fields))["choices"] == expected["choices"]
        extended = ok(client.post(f"{URL}/{context['id']}/extend", json={"text": more}))
        assert extended["tokens"] == expected["usage"]["prompt_tokens"]
        assert extended["usage"]["computed_tokens"] <= extended["tokens"]


def test_a_tree_of_contexts(client: TestClient) -> None:
    root = made(client, text="The quick brown fox", name="root")
    forks = [ok(client.post(f"{URL}/{root['id']}/fork", json={"name": name})) for name in "ab"]
    assert [fork["bytes"] for fork in forks] == [0, 0]
    grown = ok(client.post(f"{URL}/{forks[0]['id']}/extend", json={"text": " jumps over the lazy dog"}))
    assert grown["own_tokens"] == grown["tokens"] - root["tokens"] > 0
    leaf = ok(client.post(f"{URL}/{grown['id']}/fork", json={}))
    listed = ok(client.get(URL))["data"]
    assert [each["parent"] for each in listed] == [None, root["id"], root["id"], grown["id"]]
    branch = ok(client.get(f"{URL}/{grown['id']}"))
    assert (branch["ancestors"], [each["id"] for each in branch["descendants"]]) == ([root["id"]], [leaf["id"]])
    assert branch["branch_bytes"] == branch["bytes"] > 0
    assert ok(client.delete(f"{URL}/{grown['id']}"))["deleted"] == [grown["id"]]
    orphan = ok(client.get(f"{URL}/{leaf['id']}"))
    assert (orphan["parent"], orphan["own_tokens"]) == (root["id"], grown["own_tokens"])
    gone = ok(client.delete(f"{URL}/{root['id']}", params={"descendants": True}))["deleted"]
    assert gone == [root["id"], forks[1]["id"], leaf["id"]]
    assert ok(client.get(URL))["data"] == []


def test_name_ttl_and_pin_can_change(make_client: MakeClient) -> None:
    client = make_client()
    now_s = 1000.0
    state = client.app.state.kvcomm  # type: ignore[attr-defined]
    state.contexts._clock = lambda: now_s
    short, pinned = made(client, text="one", ttl="30s"), made(client, text="two", ttl="30s", pinned=True)
    assert (short["expires_in_s"], pinned["expires_in_s"]) == (30.0, None)
    changed = ok(client.patch(f"{URL}/{short['id']}", json={"name": "x", "ttl": "1m"}))
    assert (changed["name"], changed["expires_in_s"]) == ("x", 60.0)
    now_s += 59
    assert [each["expires_in_s"] for each in ok(client.get(URL))["data"]] == [1.0, None]
    now_s += 1
    assert error_of(client.get(f"{URL}/{short['id']}")) == (404, "context_not_found")
    assert [each["id"] for each in ok(client.get(URL))["data"]] == [pinned["id"]]


def test_a_foreign_context_is_as_unknown_as_one_that_never_was(
    make_client: MakeClient, keys: Keys, key_file: Any
) -> None:
    client = make_client(keys=KeyRing(key_file))
    mine = ok(client.post(URL, json={"text": "secret"}, headers=keys.header("ann")))["id"]
    for method, path, body in (
        ("GET", "", None),
        ("POST", "/fork", {}),
        ("POST", "/extend", {"text": "x"}),
        ("PATCH", "", {}),
        ("DELETE", "", None),
    ):
        answers = [
            client.request(method, f"{URL}/{each}{path}", json=body, headers=keys.header("bob"))
            for each in (mine, "ctx_" + "0" * 24)
        ]
        told = [answer.text.replace(mine, "ctx_" + "0" * 24) for answer in answers]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert told[0] == told[1]
    answer = client.post(CHAT, json=chat(context_id=mine), headers=keys.header("bob"))
    assert error_of(answer) == (404, "context_not_found")
    assert ok(client.get(URL, headers=keys.header("bob")))["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"context_id": "ctx_" + "0" * 24, "cache_salt": "x"}, "cache_salt"),
        ({"context_id": "ctx_" + "0" * 24, "store": True, "n": 2}, "n"),
        ({"context_id": "x"}, "context_id"),
    ],
)
def test_what_does_not_go_together_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    for url, body in ((CHAT, chat(**fields)), ("/v1/completions", completion(**fields))):
        answer = client.post(url, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
