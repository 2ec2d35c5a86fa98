"""Messages and tools that contexts keep: what they take is counted as it is, told, and bounded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from starlette.testclient import TestClient

from kvcomm.errors import SnapshotCorrupt
from kvcomm.server.contexts.conversation import Conversation, KeptConversation
from kvcomm.server.contexts.quota import ConversationQuota
from kvcomm.server.errors import ApiError
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings
from tests.server.conftest import HELLO, MODEL, Keys, MakeClient, chat
from tests.server.test_contexts import CHAT, URL, error_of, made, ok


def notes(num_bytes: int) -> list[dict[str, Any]]:
    """Messages of a few tokens, with so many bytes in a field of the client's own that no template shows."""
    return [{"role": "user", "content": "hi", "note": "b" * num_bytes}, {"role": "assistant", "content": ""}]


BIG = 3_900_000
SHOWN = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a" * BIG: {}}}}}]
"""A tool of so many bytes: the model reads it, so its tokens are what is too much."""


def kept_of(client: TestClient, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What the caller is told it keeps."""
    return dict(ok(client.get("/v1/stats", headers=headers))["kept"])


def test_a_few_tokens_cannot_keep_megabytes(client: TestClient) -> None:
    answer = client.post(URL, json={"messages": notes(BIG)})
    assert error_of(answer) == (400, "conversation_too_large")
    assert f"may keep {2**20}" in answer.json()["error"]["message"]
    shown = client.post(URL, json={"messages": HELLO, "tools": SHOWN})
    assert error_of(shown) == (400, "context_length_exceeded")
    assert kept_of(client)["conversation_bytes"] == 0
    assert client.get(URL).json()["data"] == []


def test_nor_by_being_extended(client: TestClient) -> None:
    fields = {"messages": notes(BIG)}
    context = made(client, messages=HELLO)
    before = kept_of(client)
    assert before["conversation_bytes"] == context["conversation_bytes"] > 0
    extended = client.post(f"{URL}/{context['id']}/extend", json=fields)
    stored = client.post(CHAT, json=chat(**fields, context_id=context["id"], store=True))
    assert {error_of(each) for each in (extended, stored)} == {(400, "conversation_too_large")}
    assert kept_of(client) == before
    node = ok(client.get(f"{URL}/{context['id']}"))
    assert (node["tokens"], node["busy"]) == (context["tokens"], False)
    ok(client.post(CHAT, json=chat(**fields, context_id=context["id"])))  # what is not kept is free
    assert kept_of(client) == before


def test_all_contexts_of_a_tenant_together(make_client: MakeClient) -> None:
    """At the limit they are kept, one byte past it they are not; what goes makes room."""
    one = len(KeptConversation(Conversation()).note())
    client = make_client(max_kept_bytes=10_000 + one)
    first = made(client, messages=notes(3000))
    rest = kept_of(client)["max_kept_bytes"] - first["conversation_bytes"]
    second = made(client, messages=notes(3000 + rest - first["conversation_bytes"]))
    assert kept_of(client)["conversation_bytes"] == kept_of(client)["max_kept_bytes"]
    refused = client.post(URL, json={"messages": notes(0)})
    assert error_of(refused) == (429, "quota_exceeded")
    message = refused.json()["error"]["message"]
    assert f"take {10_000 + one} of at most {10_000 + one} bytes" in message
    assert refused.headers["retry-after"]
    assert error_of(client.post(f"{URL}/{first['id']}/extend", json={"messages": notes(0)}))[0] == 429
    made(client, text="The quick brown fox")  # has no conversation
    ok(client.delete(f"{URL}/{second['id']}"))
    assert kept_of(client)["conversation_bytes"] == first["conversation_bytes"]
    ok(client.post(f"{URL}/{first['id']}/extend", json={"messages": notes(0)}))


def test_forks_share_until_they_differ(client: TestClient) -> None:
    base = made(client, messages=notes(5000))
    size = base["conversation_bytes"]
    forks = [ok(client.post(f"{URL}/{base['id']}/fork", json={})) for _ in range(3)]
    assert {each["conversation_bytes"] for each in forks} == {size}
    assert kept_of(client)["conversation_bytes"] == size
    grown = ok(client.post(f"{URL}/{forks[0]['id']}/extend", json={"messages": notes(100)}))
    assert grown["conversation_bytes"] > size + 100
    assert kept_of(client)["conversation_bytes"] == size + grown["conversation_bytes"]
    ok(client.delete(f"{URL}/{base['id']}"))
    assert kept_of(client)["conversation_bytes"] == size + grown["conversation_bytes"]
    for each in forks:
        ok(client.delete(f"{URL}/{each['id']}"))
    assert kept_of(client)["conversation_bytes"] == 0


def test_what_expires_makes_room(make_client: MakeClient) -> None:
    now = [0.0]
    client = make_client()
    client.app.state.kvcomm.contexts._clock = lambda: now[0]  # type: ignore[attr-defined]  # before the first context
    made(client, messages=HELLO, ttl="5m")
    now[0] = 301.0
    client.get(URL)
    assert kept_of(client)["conversation_bytes"] == 0


def test_a_restored_conversation_counts(make_client: MakeClient, tmp_path: Any) -> None:
    client = make_client(snapshots=tmp_path, max_kept_bytes=5000)
    context = made(client, messages=notes(3000))
    ok(client.post(f"{URL}/{context['id']}/snapshot", json={"name": "one"}))
    assert error_of(client.post("/v1/snapshots/one/restore", json={})) == (429, "quota_exceeded")
    assert kept_of(client)["contexts"] == 1
    ok(client.delete(f"{URL}/{context['id']}"))
    restored = ok(client.post("/v1/snapshots/one/restore", json={}))
    assert kept_of(client)["conversation_bytes"] == restored["conversation_bytes"] == context["conversation_bytes"]


def test_a_tenants_quota_is_its_own(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    client = make_client(keys=KeyRing(key_file), max_kept_bytes=5000)
    ann, bob = keys.header("ann"), keys.header("bob")
    assert client.post(URL, json={"messages": notes(4000)}, headers=ann).status_code == 201
    assert client.post(URL, json={"messages": notes(4000)}, headers=ann).status_code == 429
    assert client.post(URL, json={"messages": notes(4000)}, headers=bob).status_code == 201
    assert kept_of(client, bob)["contexts"] == 1
    status = ok(client.get("/admin/tenants/ann", headers=keys.header("admin")))
    assert status["conversation_bytes"] == kept_of(client, ann)["conversation_bytes"] > 4000


@pytest.mark.parametrize(
    "arguments", ['{"a": NaN}', '{"a": "\\ud800"}', '{"a": 1e999}', "no JSON", "[1]", '{"a": 1.0}']
)
def test_arguments_of_calls_come_back_as_they_were(client: TestClient, arguments: str) -> None:
    """What is kept as text still begins a conversation that goes on."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    context = made(client, messages=messages)
    ok(client.post(f"{URL}/{context['id']}/extend", json={"messages": HELLO}))


def test_what_is_kept_is_what_is_counted() -> None:
    conversation = Conversation(messages=[{"role": "user", "content": "\u00e4\ud800"}], tools=[{"n": float("inf")}])
    kept = KeptConversation(conversation)
    assert kept.read() == conversation
    assert sys.getsizeof(kept._text) <= kept.num_bytes + 64
    again = KeptConversation.from_note(kept.note())
    assert again is not None
    assert again.read() == conversation
    assert kept.note().isascii()
    assert KeptConversation.from_note(None) is None


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"x": 1}', '{"messages": 1}', "[" * 100_000, "1" * 5000])
def test_other_notes_are_damage(note: str) -> None:
    with pytest.raises(SnapshotCorrupt, match="is no conversation"):
        KeptConversation.from_note(note)


class QuotaMachine(RuleBasedStateMachine):
    """Holders that take, share and let go in any order, against sums of a plain list."""

    LARGEST, MOST = 400, 1000

    def __init__(self) -> None:
        super().__init__()
        server = ServerSettings(model=MODEL, max_conversation_bytes=self.LARGEST, max_kept_bytes=self.MOST)
        self.quota = ConversationQuota(server)
        self.known: dict[int, KeptConversation] = {}

    def total(self) -> int:
        distinct: list[KeptConversation] = []
        for each in self.known.values():
            if not any(each is other for other in distinct):
                distinct.append(each)
        return sum(each.num_bytes for each in distinct)

    @rule(holder=st.integers(0, 5), size=st.integers(0, 500))
    def hold(self, holder: int, size: int) -> None:
        new = KeptConversation(Conversation(rendered="x" * size))
        if new.num_bytes > self.LARGEST or self.total() + new.num_bytes > self.MOST:
            with pytest.raises(ApiError):
                self.quota.hold(holder, new)
        else:
            self.quota.hold(holder, new)
            self.known[holder] = new

    @rule(holder=st.integers(0, 5), other=st.integers(0, 5))
    def share(self, holder: int, other: int) -> None:
        shared = self.known.get(other)
        self.quota.keep(holder, shared)
        self.known.pop(holder, None)
        if shared is not None:
            self.known[holder] = shared

    @rule(holder=st.integers(0, 5))
    def let_go(self, holder: int) -> None:
        self.quota.let_go(holder)
        self.known.pop(holder, None)

    @invariant()
    def sums_agree(self) -> None:
        assert self.quota.num_bytes == self.total() <= self.MOST


QuotaMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestQuota = QuotaMachine.TestCase


class TestNamedSegments:
    """Their brothers: texts have a bound of bytes, and the shortest text has a record too."""

    def test_names_are_bounded(self, make_client: MakeClient) -> None:
        client = make_client(max_segments=3)
        for name in ("a", "b", "c", "a", "c"):
            ok(client.put(f"/v1/segments/{name}", json={"content": f"text of {name}"}))
        refused = client.put("/v1/segments/d", json={"content": "x"})
        assert error_of(refused) == (429, "too_many_segments")
        assert "has 3 of at most 3 named segments" in refused.json()["error"]["message"]
        ok(client.put("/v1/segments/a", json={"content": "another"}))
        ok(client.delete("/v1/segments/b"))
        ok(client.put("/v1/segments/d", json={"content": "x"}))

    def test_bytes_are_those_of_the_texts_that_are_kept(self, make_client: MakeClient) -> None:
        client = make_client(max_segment_bytes=100)
        texts: list[str] = []
        for size in [3, 7, 30, *range(1, 18)]:
            ok(client.put("/v1/segments/a", json={"content": "\u00e4" + "x" * size}))
            texts = [*texts, "\u00e4" + "x" * size][-16:]
            if sum(len(text.encode()) for text in texts) > 100 - 20:
                break
        assert kept_of(client)["segment_bytes"] == sum(len(text.encode()) for text in texts)
        ok(client.delete("/v1/segments/a"))
        assert kept_of(client)["segment_bytes"] == 0
        ok(client.put("/v1/segments/b", json={"content": "x" * 100}))
        assert error_of(client.put("/v1/segments/c", json={"content": "x"})) == (429, "too_many_segments")
