"""Stored responses: contexts under the contexts' rules, continued exactly, seen by nobody else, never in the way."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.keys import KeyRing
from tests.server.conftest import HELLO, Keys, MakeClient, chat
from tests.server.test_contexts import error_of, ok
from tests.server.test_responses import CHAT, QUESTION, URL, named_events, response, text_of
from tests.server.test_tools import say

CONTEXTS = "/v1/contexts"


def asked(client: TestClient, **fields: Any) -> dict[str, Any]:
    """A response."""
    return ok(client.post(URL, json=response(**fields)))


@pytest.fixture
def first_answer(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a response whose text has the same ids however often it is tokenized; random ones may not."""

    def make(**fields: Any) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            say(patch, engine, "three apples are left.")
            return asked(client, max_output_tokens=40, **fields)

    return make


def contexts(client: TestClient, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """All contexts of the caller."""
    return list(ok(client.get(CONTEXTS, headers=headers))["data"])


def registry(client: TestClient) -> ContextRegistry:
    """That of the one tenant."""
    state = client.app.state.kvcomm  # type: ignore[attr-defined]  # the app is ours
    return state.contexts.of(state.tenants.get())  # type: ignore[no-any-return]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stored_response_is_a_context(client: TestClient, stream: bool) -> None:
    answer = client.post(URL, json=response(stream=stream, store=True))
    stored = named_events(answer.text)[-1]["response"] if stream else ok(answer)
    (context,) = contexts(client)
    assert context["id"] == stored["id"].replace("resp_", "ctx_")
    assert context["name"] == stored["id"]
    assert context["tokens"] == stored["usage"]["total_tokens"]
    assert ok(client.get(f"{URL}/{stored['id']}")) == stored
    assert ok(client.delete(f"{URL}/{stored['id']}")) == {"id": stored["id"], "object": "response", "deleted": True}
    assert contexts(client) == []
    assert error_of(client.get(f"{URL}/{stored['id']}")) == (404, "response_not_found")
    assert registry(client).conversations.num_bytes == 0


@pytest.mark.parametrize("second", [{}, {"store": False}, {"stream": True}])
def test_what_follows_is_answered_as_if_all_had_been_sent(
    client: TestClient, engine: Engine, first_answer: Any, second: dict[str, Any]
) -> None:
    first = first_answer(instructions="Be brief.")
    said = [{"role": "user", "content": QUESTION}, *first["output"], {"role": "user", "content": "why 🤔?"}]
    expected = asked(client, instructions="Be brief.", input=said, store=False)
    engine.cache.clear()
    answer = client.post(
        URL, json=response(instructions="Be brief.", input="why 🤔?", previous_response_id=first["id"], **second)
    )
    after = named_events(answer.text)[-1]["response"] if "stream" in second else ok(answer)
    assert text_of(after) == text_of(expected)
    assert after["previous_response_id"] == first["id"]
    usage = after["usage"]
    assert usage["input_tokens"] == expected["usage"]["input_tokens"]
    assert usage["computed_tokens"] == usage["input_tokens"] - first["usage"]["total_tokens"]
    assert len(contexts(client)) == (1 if second.get("store") is False else 2)


@pytest.mark.parametrize("changed", [{"instructions": "Be long."}, {"instructions": None}])
def test_other_instructions_are_shown_in_place_of_the_former(
    client: TestClient, first_answer: Any, changed: dict[str, Any]
) -> None:
    first = first_answer(instructions="Be brief.")
    said = [{"role": "user", "content": QUESTION}, *first["output"], {"role": "user", "content": "why?"}]
    expected = asked(client, input=said, store=False, **changed)
    after = asked(client, input="why?", previous_response_id=first["id"], **changed)
    assert text_of(after) == text_of(expected)
    assert after["usage"]["input_tokens"] == expected["usage"]["input_tokens"]


def test_a_conversation_branches(client: TestClient) -> None:
    first = asked(client)
    left, right = (asked(client, input=text, previous_response_id=first["id"]) for text in ("why?", "and pears?"))
    third = asked(client, input="why?", previous_response_id=left["id"])
    parents = {each["id"][4:]: each["parent"] for each in contexts(client)}
    assert parents[left["id"][5:]] == parents[right["id"][5:]] == "ctx_" + first["id"][5:]
    assert parents[third["id"][5:]] == "ctx_" + left["id"][5:]
    ok(client.delete(f"{URL}/{first['id']}"))
    again = asked(client, input="why?", previous_response_id=left["id"])
    assert text_of(again) == text_of(third)
    gone = client.post(URL, json=response(previous_response_id=first["id"]))
    assert error_of(gone) == (404, "previous_response_not_found")
    assert gone.json()["error"]["param"] == "previous_response_id"


def test_input_items_are_told_page_by_page(client: TestClient) -> None:
    first = asked(client, input=[{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}])
    second = asked(client, input="c", previous_response_id=first["id"])
    where = f"{URL}/{second['id']}/input_items"
    items = ok(client.get(where, params={"order": "asc"}))["data"]
    assert [item["content"][0]["text"] for item in items] == ["a", "b", text_of(first), "c"]
    assert items[2]["id"] == first["output"][0]["id"]
    page = ok(client.get(where, params={"limit": 3}))
    assert [item["id"] for item in page["data"]] == [item["id"] for item in items[:0:-1]]
    assert page["has_more"]
    rest = ok(client.get(where, params={"limit": 3, "after": page["last_id"]}))
    assert (rest["data"], rest["has_more"]) == ([items[0]], False)
    assert error_of(client.get(where, params={"after": "x"})) == (404, "item_not_found")


def test_tenants_find_only_their_own(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    client = make_client(keys=KeyRing(key_file))
    mine = ok(client.post(URL, json=response(), headers=keys.header("ann")))
    for request in (
        client.get(f"{URL}/{mine['id']}", headers=keys.header("bob")),
        client.delete(f"{URL}/{mine['id']}", headers=keys.header("bob")),
        client.get(f"{URL}/{mine['id']}/input_items", headers=keys.header("bob")),
    ):
        assert error_of(request) == (404, "response_not_found")
    follows = client.post(URL, json=response(previous_response_id=mine["id"]), headers=keys.header("bob"))
    assert error_of(follows) == (404, "previous_response_not_found")
    assert ok(client.get(f"{URL}/{mine['id']}", headers=keys.header("ann")))["id"] == mine["id"]


def test_a_context_without_a_response_is_none(client: TestClient) -> None:
    context = client.post(CONTEXTS, json={"messages": HELLO}).json()
    assert error_of(client.get(f"{URL}/resp_{context['id'][4:]}")) == (404, "response_not_found")


def test_a_response_stays_as_it_is(client: TestClient) -> None:
    """Whoever extended its context would change what following it means."""
    first = asked(client, store=True)
    where = f"{CONTEXTS}/ctx_{first['id'][5:]}"
    extended = client.post(f"{where}/extend", json={"messages": HELLO})
    assert error_of(extended) == (409, "context_of_response")
    stored = client.post(CHAT, json=chat(context_id=where.rsplit("/", 1)[1], store=True))
    assert error_of(stored) == (409, "context_of_response")
    fork = client.post(f"{where}/fork", json={}).json()
    ok(client.post(f"{CONTEXTS}/{fork['id']}/extend", json={"messages": HELLO}))


def test_responses_that_nobody_asked_to_keep_make_room(make_client: MakeClient) -> None:
    client = make_client(max_contexts=2)
    _, second, third = (asked(client, input=text) for text in "abc")
    assert {each["name"] for each in contexts(client)} == {second["id"], third["id"]}
    ok(client.post(CONTEXTS, json={"messages": HELLO}))
    ok(client.post(CONTEXTS, json={"messages": HELLO}))
    unkept = asked(client)
    assert unkept["store"] is False
    assert error_of(client.get(f"{URL}/{unkept['id']}")) == (404, "response_not_found")
    assert error_of(client.post(URL, json=response(store=True))) == (429, "quota_exceeded")


def test_a_response_that_was_asked_for_stays(make_client: MakeClient) -> None:
    client = make_client(max_contexts=2)
    asked_for = [asked(client, input=text, store=True)["id"] for text in "ab"]
    assert asked(client)["store"] is False
    assert error_of(client.post(CONTEXTS, json={"messages": HELLO})) == (429, "quota_exceeded")
    assert [each["name"] for each in contexts(client)] == asked_for


def test_they_take_a_share_of_the_pool_only(client: TestClient, engine: Engine) -> None:
    share = engine.pool.num_pages * engine.pool.page_size // 4
    kept = [asked(client, input=f"{index} " + "apple " * 40)["id"] for index in range(16)]
    tokens = sum(each["bytes"] for each in contexts(client)) // (engine.pool.page_bytes // engine.pool.page_size)
    assert tokens <= share
    names = [each["name"] for each in contexts(client)]
    assert names == kept[-len(names) :]
    assert 1 < len(names) < 16


def test_what_is_too_large_to_be_kept_is_answered(make_client: MakeClient) -> None:
    client = make_client(max_conversation_bytes=500)
    answer = asked(client, metadata={"a": "b"}, input="apple " * 50)
    assert answer["store"] is False
    assert error_of(client.post(URL, json=response(input="apple " * 50, store=True))) == (400, "conversation_too_large")


def test_a_failed_request_leaves_nothing(client: TestClient) -> None:
    assert client.post(URL, json=response(input="apple " * 2000, store=True)).status_code == 400
    assert client.post(URL, json=response(model="gpt-9", store=True)).status_code == 404
    assert contexts(client) == []
    assert registry(client)._num_coming == 0
