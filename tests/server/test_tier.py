"""Servers over one shared tier: what one has computed or saved another one has, and the operator sees how that goes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.cli.top_view import view
from kvcomm.engine import read_ahead
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest, TierError
from kvcomm.reuse.cost import CostModel
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing
from kvcomm.server.schemas.stats import Stats
from kvcomm.server.settings import ServerSettings
from kvcomm.tiers.tier import Tier
from tests.limits import PATIENCE_S
from tests.server.conftest import HELLO, MODEL, SMALL, Keys, chat, completion, require_nothing_left
from tests.server.test_contexts import CHAT, MORE, URL, error_of, made, ok, said
from tests.tiny import TinyModel

DEAR = CostModel(pass_s=1.0, row_s=1e6, pair_s=0, move_s=0)
SECRET = b"sixteen bytes at least"
LONG = "The quick brown fox jumps over the lazy dog; the dog does not mind. " * 2


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_WAIT_S", PATIENCE_S)


@contextmanager
def server(tiny: TinyModel, folder: Path, keys: Path | None = None, **settings: Any) -> Iterator[TestClient]:
    """A server of its own, as another process would have it; what it has computed is in the tier at the end."""
    tier = Tier.open(str(folder), secret=None if keys is None else SECRET, run_tokens=8)
    with Engine(tiny.model, tiny.tokenizer, config=SMALL, tier=tier) as engine:
        engine.reuse.parts.cost.model = DEAR
        ring = None if keys is None else KeyRing(keys)
        app = make_app(engine, ServerSettings(model=MODEL, **settings), keys=ring)
        yield TestClient(app, base_url="http://localhost")
        app.state.kvcomm.contexts.close()
        assert engine.tiering.flush(PATIENCE_S)
        require_nothing_left(engine)
    tier.close()


def test_a_prompt_is_computed_once_for_all_servers(shared_model: TinyModel, tmp_path: Path) -> None:
    with server(shared_model, tmp_path / "tier") as first:
        cold = ok(first.post("/v1/completions", json=completion(prompt=LONG)))
        assert cold["usage"]["tier_tokens"] == 0
    with server(shared_model, tmp_path / "tier") as second:
        warm = ok(second.post("/v1/completions", json=completion(prompt=LONG)))
        stats = Stats(**ok(second.get("/v1/stats")))
    usage = warm["usage"]
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    assert usage["tier_tokens"] == usage["cached_prefix_tokens"] == (usage["prompt_tokens"] - 1) // 8 * 8
    assert stats.tokens.tier == stats.recent[0].tokens.tier == usage["tier_tokens"]
    assert "from the tier" in _drawn(stats)


def test_the_operator_sees_the_tier(shared_model: TinyModel, tmp_path: Path, keys: Keys, key_file: Path) -> None:
    with server(shared_model, tmp_path / "tier", key_file) as client:
        ok(client.post("/v1/completions", json=completion(prompt=LONG), headers=keys.header("ann")))
    with server(shared_model, tmp_path / "tier", key_file) as client:
        ok(client.post("/v1/completions", json=completion(prompt=LONG), headers=keys.header("bob")))
        ok(client.post("/v1/completions", json=completion(prompt=LONG), headers=keys.header("ann")))
        told = client.get("/metrics", headers=keys.header("metrics")).text
    found = dict(re.findall(r"^kvcomm:(\w*tier\w*)(?:\{[^}]*\})? (\S+)$", told, flags=re.MULTILINE))
    assert float(found["tier_gets_total"]) > 0
    assert float(found["prompt_tokens_from_tier_total"]) > 0
    assert 'kvcomm:tier_gets_total{tier="folder"}' in told


def test_a_context_is_restored_by_another_server(shared_model: TinyModel, tmp_path: Path) -> None:
    with server(shared_model, tmp_path / "tier", max_snapshots=2) as first:
        context = made(first, messages=HELLO, name="base")
        ok(first.post(CHAT, json=chat(messages=[], context_id=context["id"], store=True)))
        expected = ok(first.post(CHAT, json=chat(messages=MORE, context_id=context["id"])))
        saved = ok(first.post(f"{URL}/{context['id']}/snapshot", json={"name": "one"}))
        assert error_of(first.post(f"{URL}/{context['id']}/snapshot", json={"name": "one"}))[0] == 409
        ok(first.post(f"{URL}/{context['id']}/snapshot", json={"name": "two"}))
        full = first.post(f"{URL}/{context['id']}/snapshot", json={"name": "three"})
        assert error_of(full) == (429, "quota_exceeded")
    with server(shared_model, tmp_path / "tier") as second:
        listed = ok(second.get("/v1/snapshots"))["data"]
        assert [(each["name"], each["tokens"]) for each in listed] == [
            (name, saved["tokens"]) for name in ("one", "two")
        ]
        restored = ok(second.post("/v1/snapshots/one/restore", json={}))
        answer = ok(second.post(CHAT, json=chat(messages=MORE, context_id=restored["id"])))
        assert said(answer) == said(expected)
        ok(second.delete("/v1/snapshots/one"))
        for answer in (second.post("/v1/snapshots/one/restore", json={}), second.delete("/v1/snapshots/one")):
            assert error_of(answer) == (404, "snapshot_not_found")


def test_tenants_have_their_own_snapshots(shared_model: TinyModel, tmp_path: Path, keys: Keys, key_file: Path) -> None:
    with server(shared_model, tmp_path / "tier", key_file) as client:
        ann, bob = keys.header("ann"), keys.header("bob")
        context = ok(client.post(URL, json={"text": LONG}, headers=ann))
        ok(client.post(f"{URL}/{context['id']}/snapshot", json={"name": "one"}, headers=ann))
        assert ok(client.get("/v1/snapshots", headers=bob))["data"] == []
        assert error_of(client.post("/v1/snapshots/one/restore", json={}, headers=bob))[0] == 404
        ok(client.post("/v1/snapshots/one/restore", json={}, headers=ann))


def test_settings_of_a_tier(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--tier"):
        ServerSettings(tier_bytes=5).open_tier()
    secret = tmp_path / "secret"
    secret.write_bytes(b"short")
    for settings in ({"tier": "ftp://somewhere"}, {"tier": str(tmp_path), "tier_secret_file": secret}):
        with pytest.raises(TierError):
            ServerSettings(**settings).open_tier()
    secret.write_bytes(SECRET + b"\n")
    tier = ServerSettings(tier=str(tmp_path / "tier"), tier_secret_file=secret).open_tier()
    assert tier is not None
    assert tier.serves("ann")
    tier.close()
    assert ServerSettings(tier="redis://user:word@host/0").printable()["tier"] == "redis://host/0"
    assert ServerSettings().open_tier() is None


def _drawn(stats: Stats) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(view(stats))
    return captured.get()
