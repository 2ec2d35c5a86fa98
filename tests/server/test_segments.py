"""Segments before messages: hit exactly where they stand, checked by hash, joined by the rule asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing
from tests.engine.conftest import greedy
from tests.server.conftest import HELLO, Keys, MakeClient, chat, completion
from tests.server.test_fields import error_of

CHAT = "/v1/chat/completions"
TEXTS = {
    "A": "You are a helpful agent. ",
    "B": "The quick brown fox.\n",
    "C": "Question: how many apples?\n",
    "D": "Jumps over the lazy dog.\n",
    "E": "Answer: three.\n",
}


def given(*ids: str, **fields: Any) -> list[dict[str, Any]]:
    """Segments of those texts."""
    return [{"id": each, "content": TEXTS[each], **fields} for each in ids]


def num_tokens(engine: Engine, *ids: str) -> int:
    """Tokens of those texts, each alone."""
    return sum(len(engine.segment(TEXTS[each]).token_ids) for each in ids)


def usage_of(response: Any) -> dict[str, Any]:
    """The usage of an answer that must be one."""
    assert response.status_code == 200, response.text
    return dict(response.json()["usage"])


def answer_of(engine: Engine, ids: list[int]) -> str:
    """The stock model's greedy answer of 6 tokens, as clients see it."""
    text = engine.tokenizer.decode(greedy(engine.model, ids, 6), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_exactly_the_shared_segments_are_hit(client: TestClient, engine: Engine) -> None:
    """The table of the segment proposal; dynamic and static segments alike."""
    hits = [
        usage_of(client.post(CHAT, json=chat(segments=given(*ids))))["cached_prefix_tokens"]
        for ids in ("ABD", "ACE", "ABE")
    ]
    assert hits == [0, num_tokens(engine, "A"), num_tokens(engine, "A", "B")]


def test_the_answer_is_that_of_the_stock_model(client: TestClient, engine: Engine) -> None:
    """Cold, and on what other requests left: the prompt is the segments' tokens and then the conversation's."""
    text = engine.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    ids = [token for part in (TEXTS["A"], TEXTS["B"], text) for token in engine.segment(part).token_ids]
    wanted = answer_of(engine, ids)
    for _ in range(2):
        body = chat(segments=given("A", "B"), ignore_eos=True)
        assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == wanted
        client.post(CHAT, json=chat(segments=given("A", "C")))


def test_completions_take_segments_too(client: TestClient, engine: Engine) -> None:
    ids = list(engine.segment("The dog").token_ids)
    first, second = (
        client.post("/v1/completions", json=completion(prompt=prompt, segments=given("A")))
        for prompt in ("The dog", [ids, ids])
    )
    assert first.json()["choices"][0]["text"] == second.json()["choices"][1]["text"]
    assert usage_of(second)["prompt_tokens"] == 2 * usage_of(first)["prompt_tokens"]


def test_a_wrong_hash_is_a_conflict_and_never_a_hit(client: TestClient, engine: Engine) -> None:
    digest = engine.segment(TEXTS["A"]).digest(engine.namespace())
    for salt in (None, "salt"):
        assert usage_of(client.post(CHAT, json=chat(segments=given("A", hash=digest), cache_salt=salt)))
    error = error_of(client.post(CHAT, json=chat(segments=[*given("A"), *given("B", hash=digest)])), 409)
    assert (error["code"], error["param"]) == ("segment_hash_mismatch", "segments[1].hash")
    assert "segments[1] ('B')" in error["message"]


def test_control_tokens_in_segments_are_text(client: TestClient, engine: Engine) -> None:
    body = completion(prompt=[5], segments=[{"id": "x", "content": "<|im_end|>"}])
    assert usage_of(client.post("/v1/completions", json=body))["prompt_tokens"] > 2


@pytest.mark.parametrize(
    ("segment", "param", "code"),
    [
        ({"id": "x"}, "segments[0].content", "missing_required_parameter"),
        ({"id": "x", "content": ""}, "segments[0].content", "invalid_value"),
        ({"id": "x", "content": "a", "name": "b"}, "segments[0].content", "unknown_parameter"),
        ({"id": "x", "content": "a", "hash": "12"}, "segments[0].hash", "invalid_value"),
        ({"id": "x", "content": "a", "ttl": "1d"}, "segments[0].ttl", "invalid_value"),
        ({"id": "x", "content": "a", "kind": "odd"}, "segments[0].kind", "invalid_value"),
    ],
)
def test_errors_name_the_field(client: TestClient, segment: dict[str, Any], param: str, code: str) -> None:
    error = error_of(client.post(CHAT, json=chat(segments=[segment])))
    assert (error["param"], error["code"]) == (param, code)


class TestBoundaries:
    """`quick` and its beginning: the tokenizer knows the whole word, so a cut through it is seen."""

    CUT = [{"id": "x", "content": "The qui"}, {"id": "y", "content": "ck brown fox"}]  # noqa: RUF012  # never changed

    def ask(self, client: TestClient, rule: str, **fields: Any) -> Any:
        return client.post("/v1/completions", json=completion(segments=self.CUT, boundary=rule, **fields))

    def test_separate_takes_each_alone(self, client: TestClient, engine: Engine) -> None:
        ids = [token for part in self.CUT for token in engine.segment(part["content"]).token_ids]
        assert usage_of(self.ask(client, "separate", prompt=[5]))["prompt_tokens"] == len(ids) + 1

    def test_strict_names_the_boundary(self, client: TestClient) -> None:
        error = error_of(self.ask(client, "strict", prompt=[5]), 422)
        assert error["code"] == "boundary_splits_token"
        assert "between segments[0] ('x') and segments[1] ('y')" in error["message"]
        whole = [{"id": "x", "content": "The quick"}, {"id": "y", "content": " brown"}]
        body = completion(segments=whole, boundary="strict", prompt=" fox")
        assert usage_of(client.post("/v1/completions", json=body))["prompt_tokens"]
        body["segments"], body["prompt"] = self.CUT[:1], "ck"
        assert "what follows the segments" in error_of(client.post("/v1/completions", json=body), 422)["message"]

    def test_merge_gives_the_tokens_of_the_whole(self, client: TestClient, engine: Engine) -> None:
        answer = self.ask(client, "merge", prompt=" jumps", ignore_eos=True)
        ids = list(engine.segment("The quick brown fox jumps").token_ids)
        assert usage_of(answer)["prompt_tokens"] == len(ids)
        assert answer.json()["choices"][0]["text"] == answer_of(engine, ids)


class TestRegistry:
    """`/v1/segments`."""

    URL = "/v1/segments/role"

    def put(self, client: TestClient, text: str, **fields: Any) -> dict[str, Any]:
        response = client.put(self.URL, json={"content": text, **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def test_versions(self, client: TestClient, engine: Engine) -> None:
        first, again, second = (self.put(client, text) for text in ("one", "one", "two"))
        assert first == again
        assert [first["version"], second["version"]] == [1, 2]
        assert first["hash"] == engine.segment("one").digest(engine.namespace())
        assert client.get(self.URL).json()["content"] == "two"
        assert client.get(self.URL, params={"version": 1}).json()["content"] == "one"
        assert client.get(f"{self.URL}/versions").json()["data"] == [first, second]
        assert client.get("/v1/segments").json()["data"] == [second]
        assert client.delete(self.URL).json() == {
            "object": "segment.deleted",
            "name": "role",
            "versions": 2,
            "deleted": True,
        }
        for method, url in (("GET", self.URL), ("GET", f"{self.URL}/versions"), ("DELETE", self.URL)):
            assert error_of(client.request(method, url), 404)["code"] == "segment_not_found"

    def test_references(self, client: TestClient, engine: Engine) -> None:
        self.put(client, TEXTS["A"], kind="dynamic")
        self.put(client, TEXTS["B"])
        usage_of(client.post(CHAT, json=chat(segments=given("A"))))
        body = chat(segments=[{"id": "r", "name": "role", "version": 1}])
        assert usage_of(client.post(CHAT, json=body))["cached_prefix_tokens"] >= num_tokens(engine, "A")
        body["segments"] = [{"id": "r", "name": "role"}]
        assert usage_of(client.post(CHAT, json=body))["cached_prefix_tokens"] < num_tokens(engine, "A")
        for reference in ({"name": "role", "version": 3}, {"name": "nobody"}):
            error = error_of(client.post(CHAT, json=chat(segments=[{"id": "r", **reference}])), 404)
            assert error["code"] == "segment_not_found"

    def test_texts_are_bounded(self, make_client: MakeClient) -> None:
        client = make_client(max_segment_bytes=10)
        self.put(client, "x" * 10)
        error = error_of(client.put("/v1/segments/other", json={"content": "y"}), 429)
        assert error["code"] == "too_many_segments"

    def test_nobody_sees_another_tenants(self, make_client: MakeClient, keys: Keys, key_file: Path) -> None:
        client = make_client(keys=KeyRing(key_file))
        client.put(self.URL, json={"content": "secret"}, headers=keys.header("ann"))
        assert client.get("/v1/segments", headers=keys.header("bob")).json()["data"] == []
        assert client.get(self.URL, headers=keys.header("bob")).status_code == 404
        body = chat(segments=[{"id": "r", "name": "role"}])
        assert client.post(CHAT, json=body, headers=keys.header("bob")).status_code == 404
        assert client.post(CHAT, json=body, headers=keys.header("ann")).status_code == 200
