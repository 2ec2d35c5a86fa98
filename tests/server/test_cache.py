"""`/v1/cache/*`: warm what will be asked, see what is cached, and what a request would find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing
from kvcomm.server.segments import views
from kvcomm.server.settings import ServerSettings
from tests.engine.conftest import ROWS_ONLY
from tests.limits import PATIENCE_S
from tests.server.conftest import MODEL, Keys, MakeClient, chat, completion
from tests.server.test_fields import error_of
from tests.server.test_segments import CHAT, TEXTS, given, num_tokens, usage_of
from tests.stored import cached_by
from tests.tiny import TinyModel


class TestWarm:
    """`POST /v1/cache/warm`."""

    def warm(self, client: TestClient, *ids: str, **fields: Any) -> dict[str, Any]:
        response = client.post("/v1/cache/warm", json={"model": MODEL, "segments": given(*ids), **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def test_what_is_warm_is_hit(self, client: TestClient, engine: Engine) -> None:
        warmed = self.warm(client, "A", "B")
        ids = tuple(token for each in "AB" for token in engine.segment(TEXTS[each]).token_ids)
        assert (warmed["cached_segments"], warmed["tokens"]) == (2, len(ids))
        assert warmed["root_hash"] == Segment(ids).digest(engine.namespace())
        assert warmed["usage"]["completion_tokens"] == 0
        hashes = [each["hash"] for each in warmed["segments"]]
        segments = [{**part, "hash": digest} for part, digest in zip(given("A", "B"), hashes, strict=True)]
        assert usage_of(client.post(CHAT, json=chat(segments=segments)))["cached_prefix_tokens"] == len(ids)

    def test_salts_and_quotas_count(self, make_client: MakeClient, client: TestClient) -> None:
        self.warm(client, "A", cache_salt="x")
        assert usage_of(client.post(CHAT, json=chat(segments=given("A"))))["cached_prefix_tokens"] == 0
        small = make_client(limits={"cached_tokens": 8})
        assert self.warm(small, "C", "D", cache_salt="y")["cached_segments"] == 0


class TestExplain:
    """`POST /v1/cache/explain`: what is told is what then happens."""

    URL = "/v1/cache/explain"

    def explain(self, client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What is told about each prompt."""
        response = client.post(self.URL, json=body)
        assert response.status_code == 200, response.text
        return list(response.json()["prompts"])

    @pytest.mark.parametrize("salt", [None, "x"])
    def test_it_comes_true(self, client: TestClient, engine: Engine, salt: str | None) -> None:
        engine.reuse.parts.cost.model = ROWS_ONLY
        for ids in ("ABD", "ACE", "ABE", "ABE"):
            body = chat(segments=given(*ids), include_plan=True, cache_salt=salt)
            (told,) = self.explain(client, body)
            assert self.explain(client, body) == [told]
            usage = usage_of(client.post(CHAT, json=body))
            assert told["plan"] == usage["plan"]
            assert told["miss_reasons"] == usage["miss_reasons"]
            assert told["cached_prefix_tokens"] == usage["cached_prefix_tokens"]
            assert told["cost"]["computed_tokens"] == usage["computed_tokens"]
        cached = [
            each["cached_tokens"] for each in self.explain(client, chat(segments=given("A", "C", "D")))[0]["segments"]
        ]
        assert cached == ([0, 0, 0] if salt else [*(num_tokens(engine, each) for each in "AC"), 0])

    def test_every_prompt_is_explained(self, client: TestClient) -> None:
        client.post("/v1/completions", json=completion(prompt="The dog", segments=given("A")))
        told = self.explain(client, completion(prompt=["The dog", "A quick"], segments=given("A")))
        assert told[0]["cost"]["computed_tokens"] == 1
        assert len(told) == 2

    def test_refusals_are_those_of_the_request(self, client: TestClient) -> None:
        for body, param in (
            (chat(messages=[]), "messages"),
            (completion(prompt=""), "prompt"),
            ({"model": MODEL}, "messages"),
            (chat(top_logprobs=3), "top_logprobs"),
            (chat(nonsense=3), "nonsense"),
        ):
            assert error_of(client.post(self.URL, json=body))["param"] == param
        context = client.post("/v1/contexts", json={"text": "The dog"}).json()["id"]
        error = error_of(client.post(self.URL, json=chat(context_id=context)))
        assert (error["param"], error["code"]) == ("context_id", "unsupported_value")
        client.delete(f"/v1/contexts/{context}")
        assert error_of(client.post(self.URL, json=[]))["code"] == "invalid_body"
        assert error_of(client.post(self.URL, json=chat(model="other")), 404)["code"] == "model_not_found"


class TestTree:
    """`GET /v1/cache/tree`."""

    def test_the_tree_is_what_is_cached(self, client: TestClient, engine: Engine) -> None:
        for ids in ("ABD", "ACE"):
            client.post(CHAT, json=chat(segments=given(*ids)))
        client.post(CHAT, json=chat(cache_salt="secret"))
        answer = client.get("/v1/cache/tree")
        assert "secret" not in answer.text
        tree = answer.json()
        usages = [
            cached_by(engine, engine.namespace(space)) for space in ("default", json.dumps(["default", "secret"]))
        ]
        assert tree["tokens"] == sum(usage.num_tokens for usage in usages)
        assert tree["bytes"] == sum(usage.num_pages for usage in usages) * engine.pool.page_bytes
        assert tree["left_out"] == 0
        nodes = list(walk(tree["root"]))
        assert len({node["id"] for node in nodes}) == len(nodes)
        assert sum(node["tokens"] for node in nodes if node["kind"] == "prefix") == tree["tokens"]
        first = next(node for node in tree["root"]["children"] if node["kind"] == "prefix")
        assert first["tokens"] == num_tokens(engine, "A")
        assert first["label"] == engine.texts.decode(engine.segment(TEXTS["A"]).token_ids[:12])
        assert first["expires_in_s"] is None
        segments = [node for node in tree["root"]["children"] if node["kind"] == "segment"]
        sizes = sorted(num_tokens(engine, each) for each in TEXTS)
        assert sorted(node["tokens"] for node in segments if node["label"] not in ("answer", "text")) == sizes
        assert [node["kind"] for node in tree["root"]["children"]].count("salt") == 1

    def test_a_segments_ttl_is_that_of_the_path_to_its_end(self, shared_model: TinyModel) -> None:
        config = EngineConfig(page_size=4, pool_tokens=1024, cache_ttl_s=3600)
        with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
            client = TestClient(make_app(engine, ServerSettings(model=MODEL)), base_url="http://localhost")
            client.put("/v1/segments/c", json={"content": TEXTS["C"], "ttl": "10h"})
            segments = [*given("A", ttl="20h"), *given("B"), {"id": "C", "name": "c"}]
            client.post(CHAT, json=chat(segments=segments))
            nodes = list(walk(client.get("/v1/cache/tree").json()["root"]))
            left = [(node["tokens"], node["expires_in_s"]) for node in nodes if node["kind"] == "prefix"]
            assert [tokens for tokens, _ in left[:2]] == [num_tokens(engine, "A"), num_tokens(engine, "B", "C")]
            for (_, expires_s), ttl_s in zip(left, chain((20 * 3600, 10 * 3600), repeat(3600)), strict=False):
                assert ttl_s - PATIENCE_S < expires_s <= ttl_s

    def test_what_the_process_pins_is_shown_as_pinned(self, client: TestClient, engine: Engine) -> None:
        client.post("/v1/completions", json=completion(prompt=list(range(10, 30))))
        client.post(CHAT, json=chat(segments=given("A")))
        assert engine.cache.pin(list(range(10, 20))) == 10
        nodes = list(walk(client.get("/v1/cache/tree").json()["root"]))
        assert {node["kind"] for node in nodes} >= {"prefix", "segment", "rendition"}
        assert [(node["kind"], node["tokens"]) for node in nodes if node["pinned"]] == [("prefix", 10)]

    def test_a_tree_without_end_is_cut(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        client.get("/v1/cache/tree")
        for length in range(1, 60):
            client.post("/v1/completions", json=completion(prompt=[*range(10, 10 + length), 5]))
        tree = client.get("/v1/cache/tree").json()
        assert tree["left_out"] > 0
        assert max(depths(tree["root"])) == views.MAX_DEPTH
        monkeypatch.setattr(views, "MAX_NODES", 5)
        tree = client.get("/v1/cache/tree").json()
        assert len(list(walk(tree["root"]))) == 6

    def test_nobody_sees_another_tenants(self, make_client: MakeClient, keys: Keys, key_file: Path) -> None:
        client = make_client(keys=KeyRing(key_file))
        client.post(CHAT, json=chat(segments=given("A")), headers=keys.header("ann"))
        trees = {name: client.get("/v1/cache/tree", headers=keys.header(name)).json() for name in ("ann", "bob")}
        assert trees["ann"]["root"]["children"]
        assert (trees["bob"]["root"]["children"], trees["bob"]["tokens"]) == ([], 0)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node and all below it."""
    yield node
    for child in node["children"]:
        yield from walk(child)


def depths(node: dict[str, Any], depth: int = 0) -> Iterator[int]:
    """Of a node and all below it."""
    yield depth
    for child in node["children"]:
        yield from depths(child, depth + 1)
