"""Contexts as files: what comes back goes on where it was; what is not a tenant's own whole file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.server.keys import KeyRing
from tests.limits import PATIENCE_S
from tests.server.conftest import HELLO, Keys, MakeClient, chat
from tests.server.test_contexts import CHAT, MORE, URL, error_of, made, ok, said


@pytest.fixture
def saving(make_client: MakeClient, tmp_path: Path) -> TestClient:
    """A client of an app that keeps snapshots."""
    return make_client(snapshots=tmp_path / "snapshots", max_snapshots=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the default tenant's snapshots are."""
    return tmp_path / "snapshots" / "default"


def save(client: TestClient, context_id: str, **fields: Any) -> Any:
    """The answer to a request for a snapshot."""
    return client.post(f"{URL}/{context_id}/snapshot", json={"name": "one", **fields})


def test_a_conversation_comes_back_and_goes_on(saving: TestClient, engine: Engine) -> None:
    context = made(saving, messages=HELLO, name="base")
    ok(saving.post(CHAT, json=chat(messages=[], context_id=context["id"], store=True)))
    expected = ok(saving.post(CHAT, json=chat(messages=MORE, context_id=context["id"])))
    saved = ok(save(saving, context["id"]))
    ok(saving.delete(f"{URL}/{context['id']}"))
    engine.cache.clear()
    restored = ok(saving.post("/v1/snapshots/one/restore", json={"ttl": "20h"}))
    assert (restored["tokens"], restored["name"]) == (saved["tokens"], "base")
    assert 20 * 3600 - PATIENCE_S < restored["expires_in_s"] <= 20 * 3600
    answer = ok(saving.post(CHAT, json=chat(messages=MORE, context_id=restored["id"])))
    assert said(answer) == said(expected)
    num_new = answer["usage"]["prompt_tokens"] - saved["tokens"]
    assert answer["usage"]["computed_tokens"] == num_new + 1  # the last token of an answer is drawn, not computed


def test_a_restored_context_needs_a_place(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client(snapshots=tmp_path / "snapshots", max_contexts=1)
    context = made(client, text="The quick brown fox")["id"]
    assert save(client, context).status_code == 201
    assert error_of(client.post("/v1/snapshots/one/restore", json={})) == (429, "quota_exceeded")
    ok(client.delete(f"{URL}/{context}"))
    assert error_of(client.post("/v1/snapshots/none/restore", json={}))[0] == 404  # a failure keeps no place
    ok(client.post("/v1/snapshots/one/restore", json={}))


def test_names_are_kept_apart_and_counted(saving: TestClient, folder: Path) -> None:
    context = made(saving, text="The quick brown fox")["id"]
    assert save(saving, context).status_code == 201
    assert error_of(save(saving, context)) == (409, "snapshot_exists")
    assert save(saving, context, replace=True).status_code == 201
    assert save(saving, context, name="two").status_code == 201
    assert error_of(save(saving, context, name="three")) == (429, "quota_exceeded")
    listed = ok(saving.get("/v1/snapshots"))["data"]
    assert [(each["name"], each["refusal"]) for each in listed] == [("one", None), ("two", None)]
    assert ok(saving.delete("/v1/snapshots/one"))["name"] == "one"
    assert error_of(saving.delete("/v1/snapshots/one")) == (404, "snapshot_not_found")
    assert sorted(file.name for file in folder.iterdir()) == ["two.safetensors"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden", "a\\b", "x" * 65, "a\n", "a\0"])
def test_a_name_is_no_path(saving: TestClient, folder: Path, name: str) -> None:
    context = made(saving, text="The quick brown fox")["id"]
    assert save(saving, context, name=name).status_code == 400
    assert not folder.exists()


def test_damaged_and_foreign_files_are_refused_by_name(saving: TestClient, folder: Path) -> None:
    context = made(saving, text="The quick brown fox", cache_salt="s")["id"]
    ok(save(saving, context))
    file = folder / "one.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"x" * 100):
        file.write_bytes(damaged)
        answer = saving.post("/v1/snapshots/one/restore", json={"cache_salt": "s"})
        assert error_of(answer) == (409, "snapshot_corrupt")
        message = answer.json()["error"]["message"]
        assert "'one'" in message
        assert str(folder) not in message
    assert ok(saving.get("/v1/snapshots"))["data"][0]["refusal"]
    file.write_bytes(whole)
    assert error_of(saving.post("/v1/snapshots/one/restore", json={})) == (409, "snapshot_foreign")
    assert saving.post("/v1/snapshots/one/restore", json={"cache_salt": "s"}).status_code == 201


def test_a_tenant_has_its_own(make_client: MakeClient, keys: Keys, key_file: Path, tmp_path: Path) -> None:
    client = make_client(keys=KeyRing(key_file), snapshots=tmp_path / "snapshots")
    ann, bob = keys.header("ann"), keys.header("bob")
    context = ok(client.post(URL, json={"text": "secret"}, headers=ann))["id"]
    ok(client.post(f"{URL}/{context}/snapshot", json={"name": "one"}, headers=ann))
    assert ok(client.get("/v1/snapshots", headers=bob))["data"] == []
    restore = "/v1/snapshots/one/restore"
    assert error_of(client.post(restore, json={}, headers=bob)) == (404, "snapshot_not_found")
    (tmp_path / "snapshots" / "bob").mkdir()
    (tmp_path / "snapshots" / "ann" / "one.safetensors").rename(tmp_path / "snapshots" / "bob" / "one.safetensors")
    assert error_of(client.post(restore, json={}, headers=bob)) == (409, "snapshot_foreign")


def test_without_a_folder_there_are_none(client: TestClient) -> None:
    context = made(client, text="The quick brown fox")["id"]
    assert error_of(save(client, context)) == (404, "no_snapshots")


def test_a_folder_that_cannot_be_made_is_an_error_at_once(make_client: MakeClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="snapshots cannot be kept"):
        make_client(snapshots=tmp_path / "file" / "x")
