"""What the operator sees of tenants, and removes: of exactly one of them, to the last page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing, Role, add_key, remove_key
from kvcomm.server.settings import ServerSettings
from tests.server.conftest import HELLO, MODEL, SMALL, Keys, MakeClient, chat, require_nothing_left
from tests.server.live import PATIENCE_S, Live, serving, wait_for
from tests.server.test_contexts import CHAT, MORE, URL, error_of, ok
from tests.server.test_operation import stalled  # noqa: F401  # a fixture
from tests.tiny import tiny_model

TENANTS = "/admin/tenants"
KINDS = ("contexts", "segments", "snapshots")


class Operated:
    """A client of an app with two tenants, each with one of everything."""

    def __init__(self, client: TestClient, keys: Keys) -> None:
        self.client, self.keys = client, keys
        self.admin = keys.header("admin")
        self.ids = {name: self.fill(name) for name in ("ann", "bob")}

    def fill(self, name: str) -> str:
        """Give a tenant a pinned context, a segment and a snapshot; returns the context's id."""
        own = self.keys.header(name)
        body = {"messages": HELLO, "name": f"of {name}", "pinned": True}
        context = ok(self.client.post(URL, json=body, headers=own))["id"]
        ok(self.client.put("/v1/segments/role", json={"content": f"text of {name}"}, headers=own))
        ok(self.client.post(f"{URL}/{context}/snapshot", json={"name": "base"}, headers=own))
        return str(context)

    def get(self, path: str) -> dict[str, Any]:
        """What the operator is told."""
        return ok(self.client.get(TENANTS + path, headers=self.admin))

    def delete(self, path: str) -> Any:
        """The operator's deletion."""
        return self.client.delete(TENANTS + path, headers=self.admin)

    def counts(self, name: str) -> tuple[int, ...]:
        """How many contexts, segments and snapshots a tenant has."""
        return tuple(len(self.get(f"/{name}/{kind}")["data"]) for kind in KINDS)


@pytest.fixture
def operated(make_client: MakeClient, keys: Keys, key_file: Path, tmp_path: Path) -> Operated:
    return Operated(make_client(keys=KeyRing(key_file), snapshots=tmp_path / "snapshots"), keys)


def test_everything_is_seen_as_its_tenant_sees_it(operated: Operated) -> None:
    statuses = {each["name"]: each for each in operated.get("")["data"]}
    assert list(statuses) == ["ann", "bob"]
    for name in ("ann", "bob"):
        own = operated.keys.header(name)
        assert operated.get(f"/{name}") == statuses[name]
        assert statuses[name]["has_key"]
        assert (statuses[name]["contexts"], statuses[name]["pinned_contexts"], statuses[name]["segments"]) == (1, 1, 1)
        assert statuses[name]["segment_bytes"] == len(f"text of {name}")
        for kind in KINDS:
            assert operated.get(f"/{name}/{kind}") == ok(operated.client.get(f"/v1/{kind}", headers=own))
        (context,) = operated.get(f"/{name}/contexts")["data"]
        assert statuses[name]["conversation_bytes"] == context["conversation_bytes"] > 0
        assert 0 < context["tokens"] <= statuses[name]["context_tokens"] < context["tokens"] + SMALL.page_size


@pytest.mark.parametrize("kind", KINDS)
def test_one_thing_or_all_of_one_tenant(operated: Operated, kind: str) -> None:
    place = KINDS.index(kind)
    thing = {"contexts": operated.ids["ann"], "segments": "role", "snapshots": "base"}[kind]
    ok(operated.delete(f"/ann/{kind}/{thing}"))
    assert [operated.counts("ann")[index] for index in range(3)] == [int(index != place) for index in range(3)]
    assert operated.counts("bob") == (1, 1, 1)
    missing = operated.delete(f"/ann/{kind}/{thing}")
    assert error_of(missing) == (404, f"{kind[:-1]}_not_found")
    assert ok(operated.delete(f"/ann/{kind}"))["deleted"] == []
    assert len(ok(operated.delete(f"/bob/{kind}"))["deleted"]) == 1
    assert operated.counts("bob")[place] == 0


def test_another_tenants_things_are_as_unknown_as_those_that_never_were(operated: Operated) -> None:
    for context in (operated.ids["bob"], "ctx_" + "0" * 24):
        for query in ("", "?descendants=true"):
            assert error_of(operated.delete(f"/ann/contexts/{context}{query}")) == (404, "context_not_found")
    ok(operated.client.put("/v1/segments/bobs", json={"content": "x"}, headers=operated.keys.header("bob")))
    assert error_of(operated.delete("/ann/segments/bobs")) == (404, "segment_not_found")
    assert operated.counts("bob") == (1, 2, 1)


@pytest.mark.parametrize("name", ["zoe", "..", "%2e%2e", "ann%2F..%2Fbob", "a b", "ANN", "x" * 65])
def test_unknown_tenants(operated: Operated, name: str) -> None:
    for path in ("", *(f"/{kind}" for kind in KINDS)):
        assert operated.delete(f"/{name}{path}").status_code in (400, 404)
        assert operated.client.get(f"{TENANTS}/{name}{path}", headers=operated.admin).status_code in (400, 404)
    assert error_of(operated.delete("/zoe")) == (404, "tenant_not_found")
    assert (operated.counts("ann"), operated.counts("bob")) == ((1, 1, 1), (1, 1, 1))
    assert [each["name"] for each in operated.get("")["data"]] == ["ann", "bob"]  # asking makes nobody known


@pytest.mark.parametrize("who", ["ann", "bob", "metrics", None])
def test_only_the_operator_may(operated: Operated, who: str | None) -> None:
    headers = {} if who is None else operated.keys.header(who)
    for path in (
        "",
        "/ann",
        "/ann/contexts",
        f"/ann/contexts/{operated.ids['ann']}",
        "/ann/segments",
        "/ann/snapshots",
    ):
        for method in ("GET", "DELETE"):
            answer = operated.client.request(method, TENANTS + path, headers=headers)
            assert answer.status_code == (401 if who is None else 403)
    assert operated.counts("ann") == (1, 1, 1)


def test_a_server_without_snapshots(make_client: MakeClient, keys: Keys, key_file: Path) -> None:
    client = make_client(keys=KeyRing(key_file))
    for method in ("GET", "DELETE"):
        answer = client.request(method, f"{TENANTS}/ann/snapshots", headers=keys.header("admin"))
        assert error_of(answer) == (404, "no_snapshots")


def test_all_that_a_tenant_has(operated: Operated, engine: Engine) -> None:
    own = operated.keys.header("ann")
    ok(operated.client.post(CHAT, json=chat(cache_salt="s"), headers=own))
    before = operated.get("/bob")
    removed = ok(operated.delete("/ann"))
    assert (removed["contexts"], removed["segments"], removed["snapshots"]) == (1, 1, 0)
    assert removed["cached_tokens"] > 0
    assert operated.counts("ann") == (0, 0, 1)
    assert (operated.counts("bob"), operated.get("/bob")) == ((1, 1, 1), before)
    status = operated.get("/ann")
    assert (status["context_tokens"], status["cached_tokens"], status["conversation_bytes"]) == (0, 0, 0)
    assert ok(operated.delete("/ann?snapshots=true"))["snapshots"] == 1
    assert operated.counts("ann") == (0, 0, 0)
    ok(operated.client.post(CHAT, json=chat(), headers=own))  # its key begins anew
    assert len(engine.contexts) == 1


def test_a_revoked_tenants_pages_come_back(operated: Operated, engine: Engine, key_file: Path) -> None:
    """They held the pool until a restart: nobody could ask for what nobody has a key for."""
    ring = operated.client.app.state.kvcomm.keys  # type: ignore[attr-defined]
    remove_key(key_file, "ann")
    ring._checked_s = -1e9  # the second until it looks again
    assert operated.client.get(URL, headers=operated.keys.header("ann")).status_code == 401
    status = operated.get("/ann")
    assert (status["has_key"], status["pinned_contexts"]) == (False, 1)
    ok(operated.delete("/ann"))
    ok(operated.delete("/bob"))
    stats = engine.cache.stats()
    assert stats.num_free == stats.num_pages
    assert operated.counts("ann") == (0, 0, 1)  # known by its snapshot
    ok(operated.delete("/ann/snapshots"))
    assert error_of(operated.delete("/ann")) == (404, "tenant_not_found")


def settings(**fields: Any) -> ServerSettings:
    return ServerSettings(model=MODEL, port=0, **fields)


@pytest.fixture
def live(engine: Engine, keys: Keys, key_file: Path) -> Iterator[Live]:
    with serving(engine, settings(), keys=KeyRing(key_file)) as made:
        yield made
        wait_for(lambda: made.state.admission.num_in_flight == 0)


def ask(live: Live, method: str, path: str, headers: dict[str, str], body: Any = None) -> Any:
    """An answer."""
    return httpx2.request(method, live.url + path, json=body, headers=headers, timeout=PATIENCE_S)


def test_a_busy_context(live: Live, engine: Engine, keys: Keys, stalled: threading.Event) -> None:  # noqa: F811
    stalled.set()
    context = ok(ask(live, "POST", URL, keys.header("ann"), {"messages": HELLO}))["id"]
    stalled.clear()
    with ThreadPoolExecutor() as pool:
        extending = pool.submit(ask, live, "POST", f"{URL}/{context}/extend", keys.header("ann"), {"messages": MORE})
        wait_for(lambda: bool(engine.scheduler.requests()))
        gone = ask(live, "DELETE", f"{TENANTS}/ann/contexts/{context}", keys.header("admin"))
        assert ok(gone)["deleted"] == [context]
        assert error_of(extending.result()) == (409, "context_deleted")
    assert engine.contexts == ()


def test_requests_of_a_removed_tenant_end(
    live: Live,
    engine: Engine,
    keys: Keys,
    stalled: threading.Event,  # noqa: F811
) -> None:
    """Those that run, on contexts, for new ones and plain, in one answer and in a stream; nobody else's."""
    stalled.set()
    own, other = keys.header("ann"), keys.header("bob")
    context = ok(ask(live, "POST", URL, own, {"messages": HELLO, "pinned": True}))["id"]
    stalled.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(ask, live, "POST", f"{URL}/{context}/extend", own, {"messages": MORE}),
            pool.submit(ask, live, "POST", URL, own, {"messages": MORE, "pinned": True}),
            pool.submit(ask, live, "POST", CHAT, own, chat()),
            pool.submit(ask, live, "POST", CHAT, own, chat(stream=True)),
        ]
        bobs = pool.submit(ask, live, "POST", CHAT, other, chat())
        wait_for(lambda: len(engine.scheduler.requests()) == 5)
        removed = ok(ask(live, "DELETE", f"{TENANTS}/ann", keys.header("admin")))
        assert (removed["cancelled_requests"], removed["contexts"]) == (4, 1)
        for each in asked:
            assert error_of(each.result()) == (409, "tenant_removed")
        stalled.set()
        ok(bobs.result())
    assert engine.contexts == ()
    assert live.state.tenants.find("ann") is None


@pytest.mark.parametrize("path", [URL, "/v1/segments/late"])
def test_a_body_that_comes_after_its_key_has_gone_keeps_nothing(
    live: Live, keys: Keys, key_file: Path, path: str
) -> None:
    """Its headers passed the door; what it would pin nobody could ever delete."""
    method, body = ("PUT", b'{"content": "late"}') if "segments" in path else ("POST", b'{"text": "x", "pinned": true}')
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keys['ann']}\r\nconnection: close\r\n"
    with live.connect() as connection:
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        wait_for(lambda: live.state.admission.num_open == 1)
        remove_key(key_file, "ann")
        assert live.state.keys is not None
        live.state.keys._checked_s = -1e9
        ok(ask(live, "DELETE", f"{TENANTS}/ann", keys.header("admin")))
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 401"
    assert live.state.contexts.find("ann") is None
    assert live.state.registries.find("ann") is None


def test_a_prompt_that_was_being_read_meanwhile_keeps_nothing(
    live: Live, engine: Engine, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing takes its time in a thread; the tenant is removed before it ends."""
    begun, go_on = threading.Event(), threading.Event()
    text = live.state.prompts.text

    def slow(*arguments: Any, **named: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return text(*arguments, **named)

    monkeypatch.setattr(live.state.prompts, "text", slow)
    with ThreadPoolExecutor() as pool:
        making = pool.submit(ask, live, "POST", URL, keys.header("ann"), {"text": "a text", "pinned": True})
        assert begun.wait(PATIENCE_S)
        ok(ask(live, "DELETE", f"{TENANTS}/ann", keys.header("admin")))
        go_on.set()
        assert error_of(making.result()) == (409, "tenant_removed")
    assert engine.contexts == ()


@pytest.mark.parametrize("removes", [False, True])
def test_the_last_key_may_take_everything_along(engine: Engine, keys: Keys, key_file: Path, removes: bool) -> None:
    add_key(key_file, "ann2", tenant="ann")
    with serving(engine, settings(remove_revoked=removes), keys=KeyRing(key_file)) as live:
        for name in ("ann", "bob"):
            ok(ask(live, "POST", URL, keys.header(name), {"messages": HELLO, "pinned": True}))

        def is_refused(name: str) -> bool:
            return bool(ask(live, "GET", URL, keys.header(name)).status_code == 401)

        remove_key(key_file, "ann")
        wait_for(lambda: is_refused("ann"))
        assert len(engine.contexts) == 2  # it has another key
        remove_key(key_file, "ann2")
        if removes:
            wait_for(lambda: len(engine.contexts) == 1)
            wait_for(lambda: any(line["message"] == "tenant removed: no key is left" for line in live.log))
        else:
            status = ok(ask(live, "GET", f"{TENANTS}/ann", keys.header("admin")))
            assert status["pinned_contexts"] == 1
        assert ok(ask(live, "GET", URL, keys.header("bob")))["data"]


def test_the_default_tenant_of_a_server_without_keys(make_client: MakeClient, engine: Engine) -> None:
    client = make_client()
    ok(client.post(URL, json={"messages": HELLO, "pinned": True}))
    (status,) = ok(client.get(TENANTS))["data"]
    assert (status["name"], status["has_key"], status["contexts"]) == ("default", True, 1)
    ok(client.delete(f"{TENANTS}/default"))
    assert engine.contexts == ()


TINY = tiny_model()


class RemovalMachine(RuleBasedStateMachine):
    """Tenants that make and delete, and an operator who does, in any order, against sets of names."""

    names = st.sampled_from(["ann", "bob"])

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "keys.json"
        self.keys = Keys({name: add_key(file, name) for name in ("ann", "bob")})
        self.keys["admin"] = add_key(file, "admin", role=Role.ADMIN)
        self.engine = Engine(TINY.model, TINY.tokenizer, config=SMALL)
        server = ServerSettings(model=MODEL, snapshots=Path(self.folder.name) / "snapshots")
        self.app = make_app(self.engine, server, keys=KeyRing(file))
        self.client = TestClient(self.app, base_url="http://localhost")
        self.known: dict[str, dict[str, set[str]]] = {name: {kind: set() for kind in KINDS} for name in ("ann", "bob")}

    def ask(self, who: str, method: str, path: str, **fields: Any) -> Any:
        return self.client.request(method, path, headers=self.keys.header(who), **fields)

    @rule(name=names, size=st.integers(1, 9))
    def context(self, name: str, size: int) -> None:
        made = ok(self.ask(name, "POST", URL, json={"token_ids": list(range(5, 5 + size)), "pinned": True}))
        self.known[name]["contexts"].add(made["id"])

    @rule(name=names, segment=st.sampled_from(["a", "b"]))
    def segment(self, name: str, segment: str) -> None:
        ok(self.ask(name, "PUT", f"/v1/segments/{segment}", json={"content": "text"}))
        self.known[name]["segments"].add(segment)

    @rule(name=names, snapshot=st.sampled_from(["a", "b"]))
    def snapshot(self, name: str, snapshot: str) -> None:
        for context in sorted(self.known[name]["contexts"])[:1]:
            ok(self.ask(name, "POST", f"{URL}/{context}/snapshot", json={"name": snapshot, "replace": True}))
            self.known[name]["snapshots"].add(snapshot)

    @rule(name=names, kind=st.sampled_from(KINDS), index=st.integers(0, 3))
    def delete_one(self, name: str, kind: str, index: int) -> None:
        """Of any tenant's things, below this one's name."""
        things = sorted(set().union(*(each[kind] for each in self.known.values())))
        if things:
            thing = things[index % len(things)]
            answer = self.ask("admin", "DELETE", f"{TENANTS}/{name}/{kind}/{thing}")
            assert answer.status_code == (200 if thing in self.known[name][kind] else 404)
            self.known[name][kind].discard(thing)

    @rule(name=names, kind=st.sampled_from(KINDS))
    def delete_kind(self, name: str, kind: str) -> None:
        answer = ok(self.ask("admin", "DELETE", f"{TENANTS}/{name}/{kind}"))
        assert set(answer["deleted"]) == self.known[name][kind]
        self.known[name][kind].clear()

    @rule(name=names, snapshots=st.booleans())
    def remove(self, name: str, snapshots: bool) -> None:
        answer = ok(self.ask("admin", "DELETE", f"{TENANTS}/{name}?snapshots={str(snapshots).lower()}"))
        for kind in KINDS[: 3 if snapshots else 2]:
            assert answer[kind] == len(self.known[name][kind])
            self.known[name][kind].clear()

    @invariant()
    def everybody_has_what_is_known(self) -> None:
        for name in getattr(self, "known", ()):
            for kind in KINDS:
                data = ok(self.ask("admin", "GET", f"{TENANTS}/{name}/{kind}"))["data"]
                assert {each["id" if kind == "contexts" else "name"] for each in data} == self.known[name][kind]
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            assert len(self.engine.contexts) == sum(len(each["contexts"]) for each in self.known.values())

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.client.close()
            self.app.state.kvcomm.contexts.close()
            require_nothing_left(self.engine)
            self.engine.close()
            self.folder.cleanup()


RemovalMachine.TestCase.settings = hypothesis_settings(max_examples=12, stateful_step_count=20, deadline=None)
TestRemoval = RemovalMachine.TestCase
