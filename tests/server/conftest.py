"""An app over a tiny model; whatever a test does, no request, place or page may be left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from starlette.testclient import TestClient

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing, Role, add_key
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S, wait_for
from tests.server.live import Live, serving
from tests.tiny import TinyModel, tiny_model

SMALL = EngineConfig(page_size=4, pool_tokens=4096, max_batch_tokens=64, prefill_chunk=16)
MODEL = "tiny"
HELLO = [{"role": "user", "content": "how many apples are left?"}]

MakeClient = Callable[..., TestClient]


def roomy_model() -> TinyModel:
    """A model with room for described tools, whose every letter may be a token."""
    tiny = tiny_model()
    tiny.model.config.max_position_embeddings = 2048
    return tiny


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """One random model for a whole test file; nobody changes it."""
    return tiny_model()


@pytest.fixture
def engine(shared_model: TinyModel) -> Iterator[Engine]:
    """An engine with small pages. At the end nothing is in flight and every page comes back."""
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as made:
        yield made
        require_nothing_left(made)


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server without keys, whose requests are gone at the end."""
    with serving(engine, ServerSettings(model=MODEL, port=0)) as made:
        yield made
        wait_for(lambda: made.state.admission.num_in_flight == 0)


def require_nothing_left(engine: Engine) -> None:
    """Nothing in flight, no page lost; what requests have taught may take a moment."""
    assert engine.wait_idle(PATIENCE_S)
    assert engine.scheduler.requests() == []
    engine.check_integrity()
    engine.cache.clear()
    stats = engine.cache.stats()
    assert stats.num_free == stats.num_pages, stats


@pytest.fixture
def make_client(engine: Engine) -> Iterator[MakeClient]:
    """Makes clients of apps over the engine, from settings; at the end every place is free again."""
    apps: list[FastAPI] = []

    def make(*, keys: KeyRing | None = None, traces: TracerProvider | None = None, **settings: Any) -> TestClient:
        apps.append(make_app(engine, ServerSettings(model=MODEL, **settings), keys=keys, traces=traces))
        return TestClient(apps[-1], base_url="http://localhost")

    yield make
    for app in apps:
        state = app.state.kvcomm
        state.contexts.close()
        assert (state.admission.num_open, state.admission.num_in_flight) == (0, 0)
        for name in state.tenants.names:
            tenant = state.tenants.get(name)
            assert (tenant.num_requests, tenant.held_tokens) == (0, 0)


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    """A client of an app with default settings and no keys."""
    return make_client()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Where keys go; no file yet."""
    return tmp_path / "keys.json"


class Keys(dict[str, str]):
    """Names to keys, as headers too."""

    def header(self, name: str) -> dict[str, str]:
        """The header that carries a key."""
        return {"authorization": f"Bearer {self[name]}"}


@pytest.fixture
def keys(key_file: Path) -> Keys:
    """Two tenants, an admin and a metrics reader, in the key file."""
    made = Keys(ann=add_key(key_file, "ann"), bob=add_key(key_file, "bob"))
    made["admin"] = add_key(key_file, "admin", role=Role.ADMIN)
    made["metrics"] = add_key(key_file, "metrics", role=Role.METRICS)
    return made


def chat(**fields: Any) -> dict[str, Any]:
    """A short greedy chat request."""
    return {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    """A short greedy completion request."""
    return {"model": MODEL, "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, **fields}
