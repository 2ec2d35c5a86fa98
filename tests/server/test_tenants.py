"""Tenants: nothing of one is visible to another, and each keeps to its own limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.errors import PoolExhausted
from kvcomm.server.keys import KeyRing, add_key, remove_key
from kvcomm.server.settings import Limits
from kvcomm.server.tenants import TokenBucket, namespace
from tests.server.conftest import Keys, MakeClient, chat

CHAT = "/v1/chat/completions"
EVERYBODY = {"", "ann", "bob", "admin", "metrics", "wrong"}


@pytest.fixture
def secured(make_client: MakeClient, keys: Keys, key_file: Path) -> TestClient:
    """A client of an app that needs keys."""
    return make_client(keys=KeyRing(key_file))


def usage_of(response: Any) -> dict[str, Any]:
    """The usage of a chat response."""
    assert response.status_code == 200, response.text
    return dict(response.json()["usage"])


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/health", EVERYBODY),
        ("/ready", EVERYBODY),
        ("/version", EVERYBODY),
        ("/openapi.json", EVERYBODY),
        ("/ui", EVERYBODY),
        ("/", EVERYBODY),
        ("/v1/stats", {"ann", "bob"}),
        ("/v1/models", {"ann", "bob"}),
        ("/metrics", {"admin", "metrics"}),
        ("/admin/status", {"admin"}),
        ("/nothing", set()),
    ],
)
def test_which_key_opens_what(secured: TestClient, keys: Keys, path: str, allowed: set[str]) -> None:
    keys["wrong"] = "kv-" + "x" * 43
    statuses = {name: secured.get(path, headers=keys.header(name)).status_code for name in keys}
    statuses[""] = secured.get(path).status_code
    refused = {name: status for name, status in statuses.items() if name not in allowed}
    assert {name for name, status in statuses.items() if status == 200} == allowed
    assert refused.pop("wrong", 401) == 401
    assert refused.pop("", 401) == 401
    assert set(refused.values()) <= {403, 404}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer kv-x y", "bearer\tx"])
def test_headers_that_carry_no_key(secured: TestClient, header: str) -> None:
    response = secured.get("/v1/models", headers={"authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")


def test_a_tenant_never_hits_what_another_cached(secured: TestClient, keys: Keys) -> None:
    for fields in ({}, {"cache_salt": "s"}):
        assert usage_of(secured.post(CHAT, json=chat(**fields), headers=keys.header("ann")))["computed_tokens"] > 1
        assert usage_of(secured.post(CHAT, json=chat(**fields), headers=keys.header("ann")))["computed_tokens"] == 1
        usage = usage_of(secured.post(CHAT, json=chat(**fields), headers=keys.header("bob")))
        assert usage["cached_prefix_tokens"] == 0
        assert set(usage["miss_reasons"]) == {"new"}  # not even that it was there and went


def test_two_keys_of_one_tenant_share(make_client: MakeClient, key_file: Path) -> None:
    old = add_key(key_file, "old", tenant="ann")
    new = add_key(key_file, "new", tenant="ann")
    client = make_client(keys=KeyRing(key_file))
    client.post(CHAT, json=chat(), headers={"authorization": f"Bearer {old}"})
    assert usage_of(client.post(CHAT, json=chat(), headers={"authorization": f"Bearer {new}"}))["computed_tokens"] == 1


def test_answers_hold_nothing_that_counts_others(secured: TestClient, keys: Keys) -> None:
    """Ids and errors are the same for a tenant whether or not others were busy in between."""
    before = secured.post(CHAT, json=chat(), headers=keys.header("ann"))
    for _ in range(3):
        secured.post(CHAT, json=chat(), headers=keys.header("bob"))
    after = secured.post(CHAT, json=chat(), headers=keys.header("ann"))
    for response in (before, after):
        body = response.json()
        assert len(body.pop("id")) == len("chatcmpl-") + 32  # random, no counter
        assert "bob" not in response.text
        assert not set(response.headers) - {"content-length", "content-type", "x-request-id"}
    models = [secured.get("/v1/models", headers=keys.header(name)).json() for name in ("ann", "bob")]
    assert models[0] == models[1]


def test_errors_about_a_full_pool_tell_no_numbers(secured: TestClient, keys: Keys, engine: Engine) -> None:
    held: list[Context] = []
    with pytest.raises(PoolExhausted, match=r"\d"):  # what the engine itself says does tell
        _fill(engine, held)
    response = secured.post(CHAT, json=chat(max_tokens=200), headers=keys.header("ann"))
    for context in held:
        context.release()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert not any(char.isdigit() for char in response.json()["error"]["message"])


def _fill(engine: Engine, held: list[Context]) -> None:
    """Make contexts until the pool is full."""
    while True:
        held.append(engine.context(f"{len(held)} " + "x " * 100, tenant="bob"))


def test_the_log_names_the_tenant_but_no_text(
    secured: TestClient, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="kvcomm.server")
    secured.post(CHAT, json=chat(messages=[{"role": "user", "content": "secret words"}]), headers=keys.header("ann"))
    (record,) = [record for record in caplog.records if record.getMessage() == "request"]
    fields = record.__dict__["fields"]
    assert (fields["tenant"], fields["status"], fields["path"]) == ("ann", 200, CHAT)
    assert fields["prompt_tokens"] > 0
    assert "secret" not in json.dumps(fields)


def test_a_removed_key_is_refused_within_a_second(make_client: MakeClient, keys: Keys, key_file: Path) -> None:
    now = [0.0]
    client = make_client(keys=KeyRing(key_file, clock=lambda: now[0]))
    assert client.get("/v1/models", headers=keys.header("ann")).status_code == 200
    remove_key(key_file, "ann")
    now[0] = 1.0
    assert client.get("/v1/models", headers=keys.header("ann")).status_code == 401
    assert client.get("/v1/models", headers=keys.header("bob")).status_code == 200


def test_the_rate_is_limited_per_tenant(make_client: MakeClient, key_file: Path) -> None:
    keys = Keys(ann=add_key(key_file, "ann", limits=Limits(requests_per_minute=2)), bob=add_key(key_file, "bob"))
    client = make_client(keys=KeyRing(key_file))
    client.app.state.kvcomm.tenants._clock = lambda: 0.0  # type: ignore[attr-defined]  # no rate recovers meanwhile
    statuses = [client.get("/v1/models", headers=keys.header("ann")).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = client.get("/v1/models", headers=keys.header("ann"))
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) == 30
    assert client.get("/v1/models", headers=keys.header("bob")).status_code == 200
    assert client.get("/health").status_code == 200


@given(per_minute=st.floats(0.5, 600), gaps_s=st.lists(st.floats(0, 200), max_size=30))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: float, gaps_s: list[float]) -> None:
    now = [0.0]
    bucket = TokenBucket(per_minute, clock=lambda: now[0])
    num_given = 0
    for gap_s in gaps_s:
        now[0] += gap_s
        wait_s = bucket.take()
        num_given += wait_s == 0
        assert num_given <= max(1.0, per_minute) + now[0] * per_minute / 60 + 1e-6
        if wait_s:  # what it says is true
            now[0] += wait_s + 1e-6
            assert bucket.take() == 0
            num_given += 1


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(pairs=st.lists(st.tuples(NAMES, st.none() | st.text(min_size=1)), min_size=2, max_size=2, unique=True))
def test_names_and_salts_never_meet(pairs: list[tuple[str, str | None]]) -> None:
    first, second = (namespace(*pair) for pair in pairs)
    assert first != second


def test_a_cached_quota_evicts_the_tenants_own(make_client: MakeClient, engine: Engine, key_file: Path) -> None:
    keys = Keys(ann=add_key(key_file, "ann", limits=Limits(cached_tokens=64)), bob=add_key(key_file, "bob"))
    client = make_client(keys=KeyRing(key_file))
    client.post(CHAT, json=chat(), headers=keys.header("bob"))
    for salt in (None, "a", "b", "c"):
        for word in ("apple", "banana", "cherry"):
            messages = [{"role": "user", "content": word * 3}]
            response = client.post(CHAT, json=chat(messages=messages, cache_salt=salt), headers=keys.header("ann"))
            assert response.status_code == 200
    tenants = client.app.state.kvcomm.tenants  # type: ignore[attr-defined]
    assert 0 < tenants.num_cached(tenants.get("ann")) <= 64  # over all its salts together
    assert usage_of(client.post(CHAT, json=chat(), headers=keys.header("bob")))["computed_tokens"] == 1


def test_salts_are_bounded(make_client: MakeClient, engine: Engine) -> None:
    client = make_client(max_salts=3)
    for salt in "abcd":
        client.post(CHAT, json=chat(cache_salt=salt))
    assert usage_of(client.post(CHAT, json=chat(cache_salt="b")))["computed_tokens"] == 1
    assert usage_of(client.post(CHAT, json=chat(cache_salt="a")))["cached_prefix_tokens"] == 0


def test_a_salt_that_is_dropped_leaves_nothing(make_client: MakeClient, engine: Engine) -> None:
    """Clients make them up as they like; quotas and renditions of each stayed for good."""
    client = make_client(max_salts=2, limits=Limits(cached_tokens=1000))
    for index in range(6):
        salt, segment = f"salt {index}", {"id": "d", "content": "a document of some length", "kind": "dynamic"}
        assert client.post(CHAT, json=chat(cache_salt=salt, segments=[segment])).status_code == 200
        made = client.post("/v1/contexts", json={"text": "a text of a context", "cache_salt": salt})
        assert client.delete(f"/v1/contexts/{made.json()['id']}").status_code == 200
    memory = engine.memory
    assert len(memory.renditions._spaces) == 2
    assert not engine.reuse.parts.book._tenants.keys() - memory.renditions._spaces.keys()


def test_limits_follow_the_key_file(key_file: Path, make_client: MakeClient) -> None:
    now = [0.0]
    add_key(key_file, "ann", limits=Limits(max_requests=1))
    client = make_client(keys=KeyRing(key_file, clock=lambda: now[0]))
    tenants = client.app.state.kvcomm.tenants  # type: ignore[attr-defined]
    assert tenants.get("ann").limits.max_requests == 1
    remove_key(key_file, "ann")
    add_key(key_file, "ann", limits=Limits(max_requests=2, requests_per_minute=5))
    now[0] = 1.0
    assert tenants.get("ann").limits.max_requests == 2
    assert tenants.get("ann").bucket.per_minute == 5


def test_admin(secured: TestClient, keys: Keys) -> None:
    admin = keys.header("admin")
    secured.post(CHAT, json=chat(), headers=keys.header("ann"))
    status = secured.get("/admin/status", headers=admin).json()
    (tenant,) = status["tenants"]
    assert tenant["name"] == "ann"
    assert tenant["cached_tokens"] > 0
    cleared = secured.delete("/admin/tenants/ann/cache", headers=admin)
    assert cleared.json() == {"cleared_tokens": tenant["cached_tokens"]}
    assert secured.get("/admin/status", headers=admin).json()["tenants"][0]["cached_tokens"] == 0
    assert secured.delete("/admin/tenants/zoe/cache", headers=admin).status_code == 404
    assert usage_of(secured.post(CHAT, json=chat(), headers=keys.header("ann")))["cached_prefix_tokens"] == 0


def test_metrics_name_no_tenant(secured: TestClient, keys: Keys) -> None:
    secured.post(CHAT, json=chat(cache_salt="pepper"), headers=keys.header("ann"))
    text = secured.get("/metrics", headers=keys.header("metrics")).text
    assert 'status="200"' in text
    assert '"ann"' not in text
    assert "pepper" not in text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[evil", 403),
        ("", 403),
    ],
)
def test_without_keys_only_this_machine_is_meant(client: TestClient, host: str, status: int) -> None:
    """A web page whose name was made to point here is same-origin for its browser: only the Host header tells."""
    assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_with_keys_any_host_will_do(secured: TestClient, keys: Keys) -> None:
    assert secured.get("/v1/models", headers={"host": "api.example", **keys.header("ann")}).status_code == 200
