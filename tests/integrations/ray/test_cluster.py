"""The whole app without Ray: what clients see of several replicas, and of one that dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.server.keys import Role, add_key
from tests.integrations.ray.local import MODEL, Cluster, cluster, is_head
from tests.tiny import TinyModel

TEXT = "You are a helpful agent. Question: how many apples are left?"
MORE = " three apples are left."
JSON = {"content-type": "application/json"}


def chat(client: TestClient, text: str = "how many apples?", **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def context(client: TestClient, text: str = TEXT, **more: Any) -> dict[str, Any]:
    made = client.post("/v1/contexts", json={"text": text, **more})
    assert made.status_code == 201, made.text
    return dict(made.json())


def extend(client: TestClient, context_id: str, text: str = MORE) -> dict[str, Any]:
    made = client.post(f"/v1/contexts/{context_id}/extend", json={"text": text})
    assert made.status_code == 200, made.text
    return dict(made.json())


def behind(client: TestClient, context_id: str) -> str:
    """What the model says behind a context, which stays as it is."""
    body = {"model": MODEL, "prompt": " so", "context_id": context_id, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def alone(tiny: TinyModel, text: str) -> str:
    """The same of one replica that has computed a text itself."""
    with cluster(tiny, "alone") as one:
        client = one.client()
        return behind(client, context(client, text)["id"])


def test_the_same_answer_as_from_one_replica_whole_and_streamed(tiny: TinyModel) -> None:
    with cluster(tiny, "alone") as one:
        wanted = chat(one.client())["choices"][0]["message"]["content"]
    with cluster(tiny, "a", "b") as two:
        client = two.client()
        assert chat(client)["choices"][0]["message"]["content"] == wanted
        body = {"model": MODEL, "messages": [{"role": "user", "content": "how many apples?"}], "max_tokens": 6}
        with client.stream("POST", "/v1/chat/completions", json={**body, "temperature": 0, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(each["choices"][0]["delta"].get("content", "") for each in events if each["choices"]) == wanted


def test_errors_are_the_servers_own(tiny: TinyModel) -> None:
    with cluster(tiny, "a", "b", max_body_bytes=2000) as two:
        client = two.client()
        assert client.post("/v1/chat/completions", json={"model": MODEL}).json()["error"]["param"] == "messages"
        assert client.post("/v1/chat/completions", content=b"{", headers=JSON).json()["error"]["code"] == "invalid_json"
        assert client.post("/v1/chat/completions", content=b"{" + b" " * 3000).status_code == 413
        assert client.get("/nothing").status_code == 404
        assert client.get("/v1/contexts/ctx_" + "0" * 24).json()["error"]["code"] == "context_not_found"
        assert client.get("/v1/models", headers={"host": "elsewhere.example"}).status_code == 403
        answer = client.get("/health", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")


def test_a_prompt_stays_with_its_replica_and_others_spread(tiny: TinyModel) -> None:
    with cluster(tiny, "a", "b", "c") as three:
        client = three.client()
        texts = [f"agent {number}: how many apples are left?" for number in range(12)]
        for _ in range(3):
            for text in texts:
                chat(client, text, max_tokens=1)
        where = [{asked.wanted.first_key for asked in each.asked} for each in three.replicas.living.values()]
        assert sum(map(len, where)) == len(texts)
        assert all(where), "three replicas, and one has nothing to do"


def test_a_key_is_checked_before_and_behind_the_ingress(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    ann, bob = (add_key(file, name) for name in ("ann", "bob"))
    root = add_key(file, "root", role=Role.ADMIN)
    with cluster(tiny, "a", "b", tier=tmp_path / "tier", secret=b"0123456789abcdef", keys=file) as two:
        client = two.client()
        assert client.post("/v1/contexts", json={"text": TEXT}).status_code == 401
        assert all(not each.asked for each in two.replicas.living.values()), "no replica was asked"
        client.headers["authorization"] = f"Bearer {ann}"
        made = context(client)
        assert behind(client, made["id"])
        client.headers["authorization"] = f"Bearer {bob}"
        assert client.get(f"/v1/contexts/{made['id']}").status_code == 404
        assert client.get("/metrics").status_code == 403
        client.headers["authorization"] = f"Bearer {root}"
        metrics = client.get("/metrics")
        assert 'replica="a"' in metrics.text
        assert 'replica="b"' in metrics.text
        two.replicas.kill(two.replicas.holder_of(made["id"])[0])
        client.headers["authorization"] = f"Bearer {bob}"
        assert client.get(f"/v1/contexts/{made['id']}").status_code == 404
        client.headers["authorization"] = f"Bearer {ann}"
        assert client.get(f"/v1/contexts/{made['id']}").json()["tokens"] == made["tokens"]


def test_without_keys_only_this_machine_is_served(tiny: TinyModel) -> None:
    with cluster(tiny, "a") as one:
        client = TestClient(one.client().app, base_url="http://localhost", client=("10.0.0.7", 1))
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "keys_needed")


def test_what_every_replica_keeps_is_told_to_all(tiny: TinyModel) -> None:
    with cluster(tiny, "a", "b") as two:
        client = two.client()
        assert client.put("/v1/segments/doc", json={"content": "The quick brown fox."}).status_code == 200
        for each in two.replicas.living.values():
            assert [text.name for text in each.serving.state.registries.of("default").latest] == ["doc"]
        ids = {context(client, f"{number} {TEXT}")["id"] for number in range(6)}
        assert {each["id"] for each in client.get("/v1/contexts").json()["data"]} == ids
        assert {len(two.replicas.holder_of(each)) for each in ids} == {1}
        assert client.delete("/v1/segments/doc").json()["versions"] == 1


def test_a_replica_that_comes_later_knows_the_names_of_segments(tiny: TinyModel, tmp_path: Path) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        for text in ("The quick", "The quick brown fox."):
            assert client.put("/v1/segments/doc", json={"content": text}).status_code == 200
        assert client.put("/v1/segments/gone", json={"content": "x"}).status_code == 200
        assert client.delete("/v1/segments/gone").status_code == 200
        before = client.get("/v1/segments/doc/versions").json()
        two.add("c")
        for name in ("a", "b"):
            two.replicas.kill(name)
        assert client.get("/v1/segments/doc/versions").json() == before
        assert client.get("/v1/segments/gone").status_code == 404
        assert chat(client, segments=[{"id": "d", "name": "doc", "version": 1}])["usage"]["prompt_tokens"]


def kill_holder(two: Cluster, context_id: str) -> None:
    (holder,) = two.replicas.holder_of(context_id)
    two.replicas.kill(holder)


def test_a_context_is_not_lost_with_its_replica(tiny: TinyModel, tmp_path: Path) -> None:
    wanted = alone(tiny, TEXT + MORE)
    with cluster(tiny, "a", "b", "c", tier=tmp_path) as three:
        client = three.client()
        made = context(client, name="first", ttl="2h")
        extend(client, made["id"])
        fork = client.post(f"/v1/contexts/{made['id']}/fork", json={"name": "second"}).json()
        before = behind(client, made["id"])
        for _ in range(2):  # whoever took it over may die as well
            kill_holder(three, made["id"])
            assert behind(client, made["id"]) == before
            assert behind(client, fork["id"]) == before
            assert three.replicas.holder_of(made["id"]) == three.replicas.holder_of(fork["id"])
        found = client.get(f"/v1/contexts/{made['id']}").json()
        assert (found["name"], found["created"], found["fidelity"]) == ("first", made["created"], "exact")
        assert 3600 < found["expires_in_s"] <= 7200
        assert [each["id"] for each in found["descendants"]] == [fork["id"]]
        assert before == wanted or len(before) == len(wanted)
    assert before


def test_a_conversation_goes_on_where_it_was(tiny: TinyModel, tmp_path: Path) -> None:
    def talk(client: TestClient, told: list[str], kill: bool, two: Cluster) -> list[str]:
        made = client.post(
            "/v1/contexts", json={"messages": [{"role": "system", "content": "You are helpful."}]}
        ).json()
        said = []
        for text in told:
            said.append(chat(client, text, context_id=made["id"], store=True)["choices"][0]["message"]["content"])
            if kill:
                kill_holder(two, made["id"])
                two.add(f"r{len(said)}")
        return said

    told = ["how many apples?", "and now?", "the dog does not mind."]
    with cluster(tiny, "a", "b", tier=tmp_path / "one") as two:
        wanted = talk(two.client(), told, False, two)
    with cluster(tiny, "a", "b", tier=tmp_path / "two") as two:
        assert talk(two.client(), told, True, two) == wanted


def test_responses_follow_one_another_across_a_death(tiny: TinyModel, tmp_path: Path) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        body = {"model": MODEL, "max_output_tokens": 6, "temperature": 0, "store": True}
        first = client.post("/v1/responses", json={**body, "input": "how many apples?"}).json()
        second = {**body, "input": "and now?", "previous_response_id": first["id"]}
        wanted = client.post("/v1/responses", json=second).json()
        kill_holder(two, "ctx_" + first["id"].removeprefix("resp_"))
        again = client.post("/v1/responses", json=second).json()
        assert again["output"][0]["content"] == wanted["output"][0]["content"]
        assert client.get(f"/v1/responses/{first['id']}").json() == first
        assert client.delete(f"/v1/responses/{wanted['id']}").json()["deleted"] is True
        assert client.get(f"/v1/responses/{wanted['id']}").status_code == 404


def test_what_was_deleted_or_has_expired_does_not_come_back(tiny: TinyModel, tmp_path: Path) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        gone, late, stays = (context(client, f"{name} {TEXT}", ttl="1h") for name in ("one", "two", "three"))
        child = client.post(f"/v1/contexts/{gone['id']}/fork", json={}).json()
        kill_holder(two, gone["id"])
        deleted = client.delete(f"/v1/contexts/{gone['id']}", params={"descendants": True}).json()["deleted"]
        assert set(deleted) == {gone["id"], child["id"]}
        (replica,) = two.replicas.living.values()
        client.get(f"/v1/contexts/{late['id']}")
        client.get(f"/v1/contexts/{stays['id']}")
        registry = replica.serving.state.contexts.find("default")
        assert registry is not None
        next(each for each in registry.nodes if each.id == late["id"]).used_s -= 3601
        assert client.get(f"/v1/contexts/{late['id']}").status_code == 404
        two.replicas.kill(replica.name)
        two.add("c")
        assert client.get(f"/v1/contexts/{stays['id']}").status_code == 200
        for each in (gone, child, late):
            assert client.get(f"/v1/contexts/{each['id']}").status_code == 404


def test_without_a_tier_contexts_end_with_their_replica(tiny: TinyModel) -> None:
    with cluster(tiny, "a", "b") as two:
        client = two.client()
        made = context(client)
        kill_holder(two, made["id"])
        assert client.get(f"/v1/contexts/{made['id']}").json()["error"]["code"] == "context_not_found"
        assert chat(client)


def test_a_request_under_which_a_replica_dies_is_answered_by_another(tiny: TinyModel, tmp_path: Path) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        wanted = chat(client)["choices"][0]["message"]["content"]
        died = []
        two.replicas.dies = lambda asked, part: part is None and not died and died.append(asked) is None  # type: ignore[func-returns-value]
        assert chat(client)["choices"][0]["message"]["content"] == wanted
        assert len(died) == 1


def test_an_extension_counts_once_though_its_first_replica_died_before_it_was_told(
    tiny: TinyModel, tmp_path: Path
) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        made = context(client)
        died = []
        two.replicas.dies = lambda asked, part: is_head(part) and not died and died.append(asked) is None  # type: ignore[func-returns-value]
        # The head is not passed on by the replica that dies; what it had kept by then does not count.
        first = extend(client, made["id"])
        assert len(died) == 1
        two.replicas.dies = lambda asked, part: False
        assert first["own_tokens"] == extend(client, context(client)["id"])["own_tokens"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_extension_through_another_ingress_counts_once_as_well(
    tiny: TinyModel, tmp_path: Path, is_kept: bool
) -> None:
    """Which has not seen the context before, and whose client gives all its requests one id."""
    with cluster(tiny, "a", "b", "c", tier=tmp_path) as three:
        made = context(three.client())
        other = three.client()
        other.headers["x-request-id"] = "always-the-same"
        wanted = extend(other, made["id"])
        died: list[Any] = []
        three.replicas.dies = lambda asked, part: is_head(part) is is_kept and not died and died.append(asked) is None  # type: ignore[func-returns-value]
        again = extend(other, made["id"])
        assert len(died) == 1
        assert again["tokens"] - wanted["tokens"] == wanted["tokens"] - made["tokens"]


def test_a_stream_whose_replica_dies_says_so(tiny: TinyModel) -> None:
    with cluster(tiny, "a", "b") as two:
        client = two.client()
        two.replicas.dies = lambda asked, part: isinstance(part, bytes) and b'"content"' in part
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_an_older_version_than_the_client_has_seen_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        made = context(client)
        extend(client, made["id"])
        for file in sorted(tmp_path.rglob("*0000000002")):
            file.unlink()  # a bucket that loses objects
        kill_holder(two, made["id"])
        answer = client.get(f"/v1/contexts/{made['id']}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "context_behind")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "swap"])
def test_a_damaged_record_is_none(tiny: TinyModel, tmp_path: Path, damage: str) -> None:
    with cluster(tiny, "a", "b", tier=tmp_path) as two:
        client = two.client()
        made, other = context(client), context(client, "another text")
        files = sorted(each for each in tmp_path.rglob("0000000001*") if each.is_file())
        assert len(files) == 2
        contents = [each.read_bytes() for each in files]
        spoiled = {
            "cut": [content[:-5] for content in contents],
            "flip": [content[:-5] + bytes([content[-5] ^ 1]) + content[-4:] for content in contents],
            "empty": [b"", b""],
            "swap": contents[::-1],
        }[damage]
        for file, content in zip(files, spoiled, strict=True):
            file.unlink()
            file.write_bytes(content)
        for each in (made, other):
            for holder in two.replicas.holder_of(each["id"]):
                two.replicas.kill(holder)
        two.add("c")
        fresh = two.client()  # which has seen no version
        for each in (made, other):
            assert fresh.get(f"/v1/contexts/{each['id']}").status_code == 404
