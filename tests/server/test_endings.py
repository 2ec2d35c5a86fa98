"""How requests end, as metrics, `/v1/stats` and the log tell it; refused ones are told to their own tenant alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion
from kvcomm.server.generation import GenerationCall
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tally import MAX_REFUSED
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import MODEL, Keys, MakeClient, chat, completion
from tests.server.live import Live, serving
from tests.server.test_metrics import samples
from tests.server.test_stats import stats_of
from tests.stalling import stalling

CHAT = "/v1/chat/completions"
LONG = chat(max_tokens=400, ignore_eos=True)


def counted(client: TestClient) -> dict[str, float]:
    """Finish reasons as the operator sees them."""
    name = "kvcomm:finished_requests_total"
    return {dict(labels)["reason"]: value for (each, labels), value in samples(client).items() if each == name}


def test_reasons_are_those_of_the_answers(client: TestClient) -> None:
    told = Counter[str]()
    bodies = [chat(n=3, seed=1, temperature=1.5), chat(stop=["a", "e", " "], max_tokens=40), chat(max_tokens=1)]
    for body in bodies:
        told.update(choice["finish_reason"] for choice in client.post(CHAT, json=body).json()["choices"])
    body = completion(prompt=["a dog", "a fox"])
    told.update(choice["finish_reason"] for choice in client.post("/v1/completions", json=body).json()["choices"])
    assert set(told) == {"length", "stop"}
    assert stats_of(client)["finish_reasons"] == counted(client) == told


def test_streams_count_as_whole_answers_do(client: TestClient) -> None:
    assert '"finish_reason":"length"' in client.post(CHAT, json=chat(stream=True, n=2, temperature=1)).text
    assert sum(stats_of(client)["finish_reasons"].values()) == 2


def test_what_was_only_computed_ahead_is_no_answer(client: TestClient) -> None:
    body = {"model": MODEL, "segments": [{"id": "a", "content": "a dog"}]}
    assert client.post("/v1/cache/warm", json=body).status_code == 200
    assert stats_of(client)["finish_reasons"] == {"prefill": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_surface_may_know_better(client: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Before the engine's results, as a stream does, or behind them: the client's reason is the one that counts."""
    results = GenerationCall.results

    async def told(call: GenerationCall) -> list[Completion]:
        if stream:
            call.ends_as("tool_calls")
        completions = await results(call)
        if not stream:
            call.ends_as("tool_calls")
        return completions

    monkeypatch.setattr(GenerationCall, "results", told)
    client.post(CHAT, json=chat(stream=stream))
    assert stats_of(client)["finish_reasons"] == counted(client) == {"tool_calls": 1}


def test_refused_requests_say_why(client: TestClient) -> None:
    first = client.post(CHAT, json=chat(nonsense=1))
    client.post(CHAT, content=b"{", headers={"content-type": "application/json"})
    client.post("/chat/completions", json=chat())
    found = stats_of(client)
    assert found["finish_reasons"] == {"refused": 3}
    assert [(each["method"], each["path"], each["status"], each["code"]) for each in found["refused"]] == [
        ("POST", "/chat/completions", 404, "unknown_url"),
        ("POST", CHAT, 400, "invalid_json"),
        ("POST", CHAT, 400, "unknown_parameter"),
    ]
    last = found["refused"][-1]
    assert (last["param"], last["message"]) == ("nonsense", first.json()["error"]["message"])
    assert last["request_id"] == first.headers["x-request-id"]
    assert found["last_minute"]["refused"] == sum(found["curves"]["refused"]) == 3
    reasons = {labels: value for (name, labels), value in samples(client).items() if "refused_requests_total" in name}
    assert reasons == {(("reason", each["code"]),): 1 for each in found["refused"]}


def test_the_list_is_bounded(client: TestClient) -> None:
    for index in range(MAX_REFUSED + 3):
        client.get(f"/nothing/{index}/" + "x" * 2000)
    kept = client.app.state.kvcomm.tenants.get().tally.refused  # type: ignore[attr-defined]
    assert {type(value) for each in kept for value in each} <= {float, int, str, type(None)}  # no error with its frames
    refused = stats_of(client)["refused"]
    assert len(refused) == MAX_REFUSED
    assert refused[0]["path"].startswith(f"/nothing/{MAX_REFUSED + 2}/")
    assert max(len(each["path"]) + len(each["message"]) for each in refused) < 2000


def test_no_tenant_sees_what_another_was_refused(
    make_client: MakeClient, keys: Keys, key_file: Path, engine: Engine
) -> None:
    client = make_client(keys=KeyRing(key_file))
    client.post(CHAT, json=chat(nonsense=1), headers=keys.header("ann"))
    client.post(CHAT, json=chat())  # without a key, it is nobody's
    client.get("/admin/nothing", headers=keys.header("ann"))  # with the wrong one, too
    ann, bob = (stats_of(client, headers=keys.header(name)) for name in ("ann", "bob"))
    assert [each["code"] for each in ann["refused"]] == ["unknown_parameter"]
    assert (ann["finish_reasons"], bob["finish_reasons"], bob["refused"]) == ({"refused": 1}, {}, [])
    assert sum(bob["curves"]["refused"]) == 0
    text = client.get("/metrics", headers=keys.header("metrics")).text
    assert 'kvcomm:finished_requests_total{reason="refused"} 3.0' in text


def test_the_servers_own_faults(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(client.app.state.kvcomm.prompts, "chat", broken)  # type: ignore[attr-defined]
    assert client.post(CHAT, json=chat()).status_code == 500
    found = stats_of(client)
    assert found["finish_reasons"] == {"failed": 1}
    assert [(each["status"], each["code"]) for each in found["refused"]] == [(500, "internal_error")]
    assert "secret" not in json.dumps(found)


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A real server, whose engine stops after the first tokens of the first answer."""
    with stalling(engine, after=8), serving(engine, ServerSettings(model=MODEL, port=0)) as running:
        yield running


def reasons(live: Live) -> dict[str, int]:
    """Finish reasons of the one tenant."""
    return dict(live.state.tenants.get().tally.finish_reasons)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(live: Live, engine: Engine, stream: bool) -> None:
    connection = live.post(json.dumps({**LONG, "stream": stream}).encode())
    if stream:
        assert connection.recv(100)
    wait_for(lambda: engine.scheduler.num_running == 1)
    connection.close()
    wait_for(lambda: reasons(live) == {"client_gone": 1})
    assert list(live.state.tenants.get().tally.refused) == []
    assert "kvcomm:refused_requests_total{" not in httpx2.get(f"{live.url}/metrics", timeout=PATIENCE_S).text


def test_a_client_that_leaves_in_the_middle_of_its_body(live: Live) -> None:
    """Bug: it counted as a request that had been refused for its body."""
    connection = live.connect()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    connection.sendall(head.encode() + b'{"model"')
    wait_for(lambda: live.state.admission.num_open == 1)
    connection.close()
    wait_for(lambda: reasons(live) == {"client_gone": 1})
    assert [line["status"] for line in live.log] == [499]


def test_an_answer_that_takes_too_long(live: Live) -> None:
    """In the middle of a stream, whose status is out already: the list has the error's own."""
    with httpx2.stream("POST", live.url + CHAT, json={**LONG, "stream": True}, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        assert next(lines)
        live.skip()
        assert "request_timeout" in [line for line in lines if line][-1]
    wait_for(lambda: reasons(live) == {"timed_out": 1})
    (refused,) = live.state.tenants.get().tally.refused
    assert (refused.status, refused.code) == (504, "request_timeout")
    (line,) = (line for line in live.log if line["message"] == "request")
    assert (line["status"], line["refusal"]) == (200, "request_timeout")


def test_a_log_line_has_them(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kvcomm.server")
    client.post(CHAT, json=chat(n=2, temperature=1))
    client.post(CHAT, json=chat(nonsense=1))
    fields: list[dict[str, Any]] = [getattr(each, "fields", {}) for each in caplog.records]
    assert [(each.get("finish_reasons"), each.get("refusal")) for each in fields] == [
        (["length", "length"], None),
        (None, "unknown_parameter"),
    ]
