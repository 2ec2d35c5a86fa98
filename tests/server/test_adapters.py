"""Adapters are models of their own to clients, as vLLM's users know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.server.app import make_app
from kvcomm.server.settings import ServerSettings, load_settings
from kvcomm.tiers.space import DEFAULT_TENANT
from tests.lora import save_lora
from tests.server.conftest import MODEL, SMALL, chat, completion, require_nothing_left
from tests.stored import cached_by
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the adapters "poet" and "judge"."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=SMALL) as made:
        for seed, name in enumerate(("poet", "judge"), start=1):
            made.adapters.load(name, save_lora(tmp_path_factory.mktemp(name), seed=seed))
        yield made
        require_nothing_left(made)


@pytest.fixture
def client(engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    app = make_app(engine, ServerSettings(model=MODEL, snapshots=tmp_path / "snapshots"))
    yield TestClient(app, base_url="http://localhost")
    app.state.kvcomm.contexts.close()


def text_of(client: TestClient, **fields: Any) -> str:
    answered = client.post("/v1/completions", json=completion(ignore_eos=True, **fields))
    assert answered.status_code == 200, answered.text
    return str(answered.json()["choices"][0]["text"])


def expected(engine: Engine, adapter: str | None) -> str:
    found = engine.generate(completion()["prompt"], adapter=adapter, max_new_tokens=6, ignore_eos=True)
    return found.text


def test_every_adapter_is_listed_as_a_model(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]

    assert [(each["id"], each["parent"]) for each in listed] == [(MODEL, None), ("judge", MODEL), ("poet", MODEL)]
    assert client.get("/v1/models/poet").json()["id"] == "poet"
    assert client.get(f"/v1/models/{MODEL}:poet").json()["id"] == "poet"


def test_a_request_names_its_adapter_as_its_model(client: TestClient, engine: Engine) -> None:
    texts = {name: text_of(client, model=name) for name in (MODEL, "poet", "judge", f"{MODEL}:poet")}

    assert texts[MODEL] == expected(engine, None)
    assert texts["poet"] == texts[f"{MODEL}:poet"] == expected(engine, "poet")
    assert texts["judge"] == expected(engine, "judge")
    assert len({texts[MODEL], texts["poet"], texts["judge"]}) == 3


def test_streams_and_chats_say_which_model_answers(client: TestClient) -> None:
    whole = client.post("/v1/chat/completions", json=chat(model="judge")).json()
    assert whole["model"] == "judge"
    plain = client.post("/v1/chat/completions", json=chat()).json()
    assert whole["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize("model", ["bard", f"{MODEL}:bard", f"{MODEL}:", "poet:judge", f"{MODEL}:{MODEL}"])
def test_unknown_names_are_refused_with_the_known_ones(client: TestClient, model: str) -> None:
    for path, body in (("/v1/completions", completion(model=model)), ("/v1/chat/completions", chat(model=model))):
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "'judge', 'poet'" in refused.json()["error"]["message"]
    assert client.get(f"/v1/models/{model}").status_code == 404


def test_a_context_is_of_one_model(client: TestClient, engine: Engine) -> None:
    made = client.post("/v1/contexts", json={"text": completion()["prompt"], "model": "poet"}).json()
    on_context = {"context_id": made["id"], "prompt": ""}

    assert text_of(client, model="poet", **on_context) == expected(engine, "poet")
    for other in (MODEL, "judge"):
        refused = client.post("/v1/completions", json=completion(model=other, **on_context))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "context_of_another_model")
    assert client.post("/v1/contexts", json={"text": "x", "model": "bard"}).status_code == 404


def test_a_snapshot_is_of_one_model(client: TestClient, engine: Engine) -> None:
    made = client.post("/v1/contexts", json={"text": completion()["prompt"], "model": "poet"}).json()
    assert client.post(f"/v1/contexts/{made['id']}/snapshot", json={"name": "notes"}).status_code < 300
    foreign = client.post("/v1/snapshots/notes/restore", json={})
    assert foreign.json()["error"]["code"] == "snapshot_foreign"
    restored = client.post("/v1/snapshots/notes/restore", json={"model": "poet"}).json()

    assert text_of(client, model="poet", context_id=restored["id"], prompt="") == expected(engine, "poet")


def test_what_is_cached_counts_over_all_adapters(client: TestClient, engine: Engine) -> None:
    engine.cache.clear()
    for name in (MODEL, "poet"):
        text_of(client, model=name)
        explained = client.post("/v1/cache/explain", json=completion(model=name)).json()["prompts"][0]
        assert explained["cached_prefix_tokens"] > 0
    cold = client.post("/v1/cache/explain", json=completion(model="judge")).json()["prompts"][0]
    assert cold["cached_prefix_tokens"] == 0
    both = client.get("/v1/stats").json()["cache"]["tokens"]
    assert both == sum(cached_by(engine, each).num_tokens for each in engine.tenancy.namespaces(DEFAULT_TENANT))
    assert client.get("/v1/cache/tree").json()["tokens"] == both > cached_by(engine, engine.namespace()).num_tokens > 0


def test_changed_weights_are_told(client: TestClient, engine: Engine) -> None:
    made = client.post("/v1/contexts", json={"text": "The fox", "model": "judge"}).json()
    layers = [layer for layer in engine.model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.scaling["judge"] *= 2
    try:
        refused = client.post("/v1/completions", json=completion(model="judge", context_id=made["id"], prompt=""))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "weights_changed")
    finally:
        for layer in layers:
            layer.scaling["judge"] /= 2


def test_the_document_lists_the_models(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]

    assert schema["properties"]["model"]["enum"] == [MODEL, "judge", "poet"]


def test_the_openai_client_sees_them(client: TestClient) -> None:
    openai = OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client)

    assert [model.id for model in openai.models.list()] == [MODEL, "judge", "poet"]
    answer = openai.chat.completions.create(model="poet", messages=chat()["messages"], max_tokens=3, temperature=0)
    assert answer.model == "poet"


def test_settings_name_folders(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('model = "smollm2-135m"\n[adapters]\npoet = "poet-lora"\n')

    assert load_settings({}, {}, file).adapters == {"poet": Path("poet-lora")}
    with pytest.raises(InvalidRequest, match="cannot be called 'smollm2-135m'"):
        load_settings({"adapters": {"smollm2-135m": Path("x")}}, {}, None)
