"""A real uvicorn: clients that go away, drains, full servers, deadlines, bodies that are too large or too slow."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.server import waiting
from kvcomm.server.contexts.snapshots import SnapshotFolder
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.segments.registry import SegmentRegistries
from kvcomm.server.settings import Limits, ServerSettings
from tests.limits import PATIENCE_S, threads, wait_for
from tests.server.conftest import MODEL, chat
from tests.server.live import Live, read_all, serving
from tests.stalling import stalling

CHAT = "/v1/chat/completions"
CANCELLING_S = 0.05
LONG = chat(max_tokens=400, ignore_eos=True)


def settings(**fields: Any) -> ServerSettings:
    """Settings of a test server."""
    return ServerSettings(model=MODEL, port=0, **fields)


def encoded(body: dict[str, Any]) -> bytes:
    """A body as it goes over the wire."""
    return json.dumps(body).encode()


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server with small limits."""
    with serving(engine, settings(max_body_bytes=2000, max_requests=2)) as made:
        yield made
        wait_for(lambda: made.state.admission.num_in_flight == 0)


@pytest.fixture
def stalled(engine: Engine) -> Iterator[threading.Event]:
    """The engine makes no step until the event is set, so that requests stay in flight."""
    with stalling(engine) as go_on:
        yield go_on


@pytest.fixture
def stalled_in_the_middle(engine: Engine) -> Iterator[threading.Event]:
    """The same after the first tokens of the first answer."""
    with stalling(engine, after=8) as go_on:
        yield go_on


@contextmanager
def meanwhile(stalled: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads to ask from while the engine is stalled; at the end it goes on, so that they end, too."""
    with ThreadPoolExecutor() as pool:
        try:
            yield pool
        finally:
            stalled.set()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("stalled_in_the_middle")
def test_a_client_that_goes_away_frees_its_pages(live: Live, engine: Engine, stream: bool) -> None:
    """Its request ends at the next step, long before its 400 tokens; all its pages come back."""
    cancelled: list[int] = []
    cancel = RequestHandle.cancel

    def recorded(handle: RequestHandle) -> None:
        if not handle.done:
            cancelled.append(handle.request_id)
        cancel(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestHandle, "cancel", recorded)
        connection = live.post(encoded({**LONG, "stream": stream}))
        if stream:
            assert connection.recv(100)
        wait_for(lambda: engine.scheduler.num_running == 1)
        connection.close()
        wait_for(lambda: live.state.admission.num_in_flight == 0)
    assert cancelled
    engine.check_integrity()
    assert engine.cache.stats().num_in_requests == 0


def test_clients_that_go_away_at_any_moment(live: Live, engine: Engine) -> None:
    """No page is lost, and the log does not take it for a fault."""
    for index in range(40):
        connection = live.post(encoded({**LONG, "stream": True}))
        if index % 3:
            connection.recv(1 + 100 * (index % 7))
        connection.close()
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    engine.check_integrity()
    assert engine.cache.stats().num_in_requests == 0
    assert httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S).status_code == 200
    assert {line["level"] for line in live.log} == {"info"}
    assert {line.get("stopped") for line in live.log} == {None, "client_gone"}


class Late:
    """A function of worker threads that does its work only after the client has gone.

    Attributes:
        num_in_flight: places that were taken then.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, live: Live) -> None:
        self.num_in_flight, self._admission = 0, live.state.admission
        self._work, self._disconnect = getattr(owner, name), waiting._disconnect
        self._has_begun, self._has_gone, self._has_ended = threading.Event(), threading.Event(), threading.Event()
        monkeypatch.setattr(owner, name, lambda *arguments, **settings: self._call(*arguments, **settings))
        monkeypatch.setattr(waiting, "_disconnect", self._noticed)

    def leave(self, connection: socket.socket) -> None:
        """Close a client's connection while the work is being done; returns once it is."""
        assert self._has_begun.wait(PATIENCE_S)
        connection.close()
        assert self._has_ended.wait(PATIENCE_S)

    def _call(self, *arguments: Any, **settings: Any) -> Any:
        self._has_begun.set()
        assert self._has_gone.wait(PATIENCE_S)
        self.num_in_flight = self._admission.num_in_flight
        made = self._work(*arguments, **settings)
        self._has_ended.set()
        return made

    async def _noticed(self, receive: Any) -> None:
        await self._disconnect(receive)
        loop = asyncio.get_running_loop()
        loop.call_later(CANCELLING_S, self._has_gone.set)  # by then the loop has cancelled who waits for the work


def test_a_client_that_goes_away_while_its_request_is_submitted(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what a worker thread submitted after its caller had been cancelled ran to its end, and nobody knew of it."""
    late = Late(monkeypatch, engine, "submit", live)
    late.leave(live.post(encoded(LONG)))
    assert late.num_in_flight == 1
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    assert engine.scheduler.requests() == []
    assert engine.cache.stats().num_in_requests == 0


def test_a_client_that_goes_away_while_a_snapshot_is_read(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: its place was given to others while the snapshot was still being read."""
    with serving(engine, settings(snapshots=tmp_path)) as live:
        with httpx2.Client(base_url=live.url, timeout=PATIENCE_S) as client:
            made = client.post("/v1/contexts", json={"text": "The quick brown fox jumps"}).json()
            saved = client.post(f"/v1/contexts/{made['id']}/snapshot", json={"name": "kept"})
            assert saved.status_code == 201
            assert client.delete(f"/v1/contexts/{made['id']}").status_code == 200
        late = Late(monkeypatch, SnapshotFolder, "restore", live)
        late.leave(live.post(encoded({}), "/v1/snapshots/kept/restore"))
        assert late.num_in_flight == 1
        wait_for(lambda: live.state.admission.num_in_flight == 0)
        wait_for(lambda: engine.cache.stats().num_in_contexts == 0)


def test_a_full_server_refuses_at_once(live: Live, stalled: threading.Event) -> None:
    waiting = [live.post(encoded(chat())) for _ in range(2)]
    wait_for(lambda: live.state.admission.num_in_flight == 2)
    refused = httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx2.get(live.url + "/ready", timeout=PATIENCE_S).status_code == 503
    assert httpx2.get(live.url + "/health", timeout=PATIENCE_S).status_code == 200
    stalled.set()
    for connection in waiting:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    assert httpx2.get(live.url + "/ready", timeout=PATIENCE_S).status_code == 200


def test_bodies_in_memory_are_bounded(live: Live) -> None:
    """Who does not finish a body holds a place as long as it is there; the others learn it before they send theirs."""
    head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n"
    slow = [live.connect() for _ in range(2)]
    for connection in slow:
        connection.sendall(head)
    wait_for(lambda: live.state.admission.num_open == 2)
    late = live.connect()
    late.sendall(head)
    assert late.recv(12) == b"HTTP/1.1 503"
    for connection in (*slow, late):
        connection.close()
    wait_for(lambda: live.state.admission.num_open == 0)


def test_draining_lets_requests_end(engine: Engine, stalled: threading.Event) -> None:
    """SIGTERM: what is in flight is answered in full, a stream to its end; nothing new is let in."""
    with serving(engine, settings()) as live:
        kept = httpx2.Client(base_url=live.url, timeout=PATIENCE_S)
        assert kept.get("/ready").status_code == 200
        streaming = live.post(encoded(chat(stream=True)))
        whole = live.post(encoded(chat()))
        wait_for(lambda: live.state.admission.num_in_flight == 2)
        live.state.admission.drain()
        assert kept.get("/ready").status_code == 503
        refused = kept.post(CHAT, json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        kept.close()
        live.server.handle_exit(signal.SIGTERM, None)
        stalled.set()
        assert read_all(streaming).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b'"finish_reason":"length"' in read_all(whole)
        streaming.close()
        whole.close()
    assert not live.server.force_exit


def test_a_drain_has_an_end(engine: Engine, stalled: threading.Event) -> None:
    with serving(engine, settings(drain_timeout_s=1)) as live:
        connection = live.post(encoded(LONG))
        wait_for(lambda: live.state.admission.num_in_flight == 1)
        live.server.handle_exit(signal.SIGTERM, None)
        read_all(connection)
        connection.close()
        wait_for(lambda: live.state.admission.num_in_flight == 0)


def test_a_second_interrupt_ends_at_once(engine: Engine) -> None:
    with serving(engine, settings()) as live:
        live.server.handle_exit(signal.SIGINT, None)
        assert not live.server.force_exit
        live.server.handle_exit(signal.SIGINT, None)
        assert live.server.force_exit


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline(engine: Engine, stalled: threading.Event, stream: bool) -> None:
    with serving(engine, settings()) as live, meanwhile(stalled) as pool:
        asked = pool.submit(httpx2.post, live.url + CHAT, json=chat(stream=stream), timeout=2 * PATIENCE_S)
        wait_for(lambda: bool(engine.scheduler.requests()))
        assert not asked.done()
        live.skip()
        response = asked.result()
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "request_timeout"
        wait_for(lambda: live.state.admission.num_in_flight == 0)


@pytest.mark.usefixtures("stalled_in_the_middle")
def test_a_deadline_in_the_middle_of_a_stream(engine: Engine) -> None:
    """The status is out already: the stream ends with an error in place of [DONE]."""
    with serving(engine, settings()) as live:
        with httpx2.stream("POST", live.url + CHAT, json={**LONG, "stream": True}, timeout=PATIENCE_S) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(lines)
            live.skip()
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        wait_for(lambda: live.state.admission.num_in_flight == 0)


def padded(num_bytes: int) -> bytes:
    """A valid request of exactly so many bytes."""
    body = encoded(chat(user=""))
    return body.replace(b'"user": ""', b'"user": "' + b"x" * (num_bytes - len(body)) + b'"')


@pytest.mark.parametrize("chunked", [False, True])
def test_the_largest_body(live: Live, chunked: bool) -> None:
    def send(body: bytes) -> httpx2.Response:
        content = iter([body[:700], body[700:]]) if chunked else body
        headers = {"content-type": "application/json"}
        return httpx2.post(live.url + CHAT, content=content, headers=headers, timeout=PATIENCE_S)

    assert send(padded(2000)).status_code == 200
    refused = send(padded(2001))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"


def test_ten_megabytes_are_refused_before_they_come(live: Live) -> None:
    connection = live.connect()
    connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000000\r\n\r\n")
    assert connection.recv(12) == b"HTTP/1.1 413"
    connection.close()


def test_an_endless_body_is_cut_off(live: Live) -> None:
    connection = live.connect()
    head = b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    connection.sendall(b"POST " + CHAT.encode() + head + b"400\r\n" + b"x" * 1024 + b"\r\n" + b"400\r\n" + b"x" * 1024)
    assert connection.recv(12) == b"HTTP/1.1 413"
    connection.close()


def test_a_slow_body(live: Live) -> None:
    connection = live.connect()
    head = b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    connection.sendall(b"POST " + CHAT.encode() + head + b"{")
    wait_for(lambda: live.state.admission.num_open == 1)
    live.skip()
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    connection.close()


def test_a_body_that_pauses(engine: Engine) -> None:
    """Long before it has to be complete."""
    with serving(engine, settings(body_pause_s=0.3)) as live, live.connect() as connection:
        connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"nothing came of the body for 0.3 s" in answer
        wait_for(lambda: live.state.admission.num_open == 0)
        metrics = httpx2.get(live.url + "/metrics").text
        assert 'kvcomm:refused_requests_total{reason="body_timeout"} 1.0' in metrics
        assert [line["refusal"] for line in live.log if line.get("status") == 408] == ["body_timeout"]


def test_half_sent_requests_of_one_tenant_shut_no_other_out(engine: Engine, key_file: Any) -> None:
    """Bug: as many sockets as requests may be in flight, all of one tenant, were a 503 for everybody else."""
    ann, bob = add_key(key_file, "ann"), add_key(key_file, "bob", limits=Limits(max_requests=1))
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nauthorization: Bearer {}\r\n\r\n"
    with serving(engine, settings(max_requests=16), keys=KeyRing(key_file)) as live, ExitStack() as stack:
        tenants = {name: live.state.tenants.get(name) for name in ("ann", "bob")}
        held = [stack.enter_context(live.connect()) for _ in range(20)]
        for connection in held:
            connection.sendall(head.format(ann).encode())
        wait_for(lambda: tenants["ann"].num_open == 14)
        refused = [connection.recv(12) for connection in held[14:]]
        assert refused == [b"HTTP/1.1 429"] * 6
        for _ in range(2):
            answer = httpx2.post(
                live.url + CHAT, json=chat(), headers={"authorization": f"Bearer {bob}"}, timeout=PATIENCE_S
            )
            assert answer.status_code == 200
        second = [stack.enter_context(live.connect()) for _ in range(2)]
        second[0].sendall(head.format(bob).encode())
        wait_for(lambda: tenants["bob"].num_open == 1)
        second[1].sendall(head.format(bob).encode())
        assert second[1].recv(12) == b"HTTP/1.1 429"  # its own limit, before its body
    wait_for(lambda: live.state.admission.num_open == 0)


def test_many_prompts_of_one_tenant_shut_no_other_out(engine: Engine, key_file: Any, stalled: threading.Event) -> None:
    ann, bob = add_key(key_file, "ann"), add_key(key_file, "bob")
    with serving(engine, settings(max_requests=16), keys=KeyRing(key_file)) as live:

        def ask(key: str, num_prompts: int) -> httpx2.Response:
            body = {"model": MODEL, "prompt": ["The quick brown fox"] * num_prompts, "max_tokens": 2}
            headers = {"authorization": f"Bearer {key}"}
            return httpx2.post(live.url + "/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)

        answers: list[httpx2.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(ann, 12)))]
        threads[0].start()
        wait_for(lambda: live.state.admission.num_in_flight == 12)
        refused = ask(ann, 4)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "fair_share")
        never = ask(ann, 17)
        assert (never.status_code, never.json()["error"]["code"]) == (400, "too_many_prompts")
        threads.append(threading.Thread(target=lambda: answers.append(ask(bob, 2))))
        threads[1].start()
        wait_for(lambda: live.state.admission.num_in_flight == 14)
        stalled.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [answer.status_code for answer in answers] == [200, 200]
        wait_for(lambda: live.state.workers.engine.num_inside == 0)


def test_one_tenants_queue_is_not_before_anothers_request(
    engine: Engine, key_file: Any, stalled: threading.Event
) -> None:
    """More prompts of one tenant than are computed at once: another tenant's request goes past those that wait."""
    keys = {name: add_key(key_file, name) for name in ("ann", "bob")}
    with serving(engine, settings(), keys=KeyRing(key_file)) as live:
        gate = live.state.workers.engine
        most = engine.config.max_running - engine.config.max_running // 8
        many = {"model": MODEL, "prompt": ["a"] * 100, "max_tokens": 2}
        answers: dict[str, httpx2.Response] = {}

        def ask(name: str, path: str, body: dict[str, Any]) -> None:
            headers = {"authorization": f"Bearer {keys[name]}"}
            answers[name] = httpx2.post(live.url + path, json=body, headers=headers, timeout=PATIENCE_S)

        threads = [threading.Thread(target=ask, args=("ann", "/v1/completions", many))]
        threads[0].start()
        wait_for(lambda: gate.num_waiting == 1)
        assert gate.num_inside == most
        threads.append(threading.Thread(target=ask, args=("bob", CHAT, chat())))
        threads[1].start()
        wait_for(lambda: gate.num_inside == most + 1)
        stalled.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert {name: answer.status_code for name, answer in answers.items()} == {"ann": 200, "bob": 200}
        assert len(answers["ann"].json()["choices"]) == 100
        wait_for(lambda: gate.num_inside == 0)


HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HEALTH[:30], HEALTH + HEALTH[:9]])
def test_slow_headers(live: Live, sent: bytes) -> None:
    """A connection without complete headers is closed, also the second request of one."""
    connection = live.connect()
    answer = b""
    if sent:
        connection.sendall(sent)
    if len(sent) > len(HEALTH):
        answer = connection.recv(12)
        assert answer == b"HTTP/1.1 200"
    wait_for(lambda: live.server.server_state.connections)
    live.skip()
    assert b"HTTP" not in read_all(connection)
    connection.close()


def test_many_slow_clients_do_not_hold_up_others(live: Live) -> None:
    slow = [live.connect() for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nx-")
    assert httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S).status_code == 200
    wait_for(lambda: len(live.server.server_state.connections) >= len(slow))
    live.skip()
    for connection in slow:
        assert read_all(connection) == b""
        connection.close()


def test_a_kept_connection_serves_again(live: Live) -> None:
    with httpx2.Client(base_url=live.url, timeout=PATIENCE_S) as kept:
        for _ in range(3):
            assert kept.post(CHAT, json=chat()).status_code == 200


def test_a_full_tenant(engine: Engine, stalled: threading.Event, key_file: Any) -> None:
    """One tenant waits for its own room, one is told to come back; others are served meanwhile."""
    (prompt,) = PromptMaker(engine, SegmentRegistries(0)).chat(ChatRequest.model_validate(chat()), "ann").segments
    need = len(prompt.token_ids) + 6
    limits = Limits(held_tokens=2 * need - 1)
    ann = add_key(key_file, "ann", limits=limits.model_copy(update={"when_full": "queue"}))
    bob = add_key(key_file, "bob", limits=limits.model_copy(update={"when_full": "refuse"}))
    with serving(engine, settings(), keys=KeyRing(key_file)) as live:
        tenants = {key: live.state.tenants.get(name) for key, name in ((ann, "ann"), (bob, "bob"))}
        answers: dict[tuple[str, int], httpx2.Response] = {}

        def ask(key: str, index: int) -> None:
            headers = {"authorization": f"Bearer {key}"}
            answers[key, index] = httpx2.post(live.url + CHAT, json=chat(), headers=headers, timeout=PATIENCE_S)

        with threads(*(partial(ask, key, index) for key in (ann, bob) for index in range(2))):
            wait_for(lambda: len(answers) == 1 and all(tenant.num_requests == 1 for tenant in tenants.values()))
            ((key, _),) = answers
            (refused,) = answers.values()
            assert key == bob
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "quota_exceeded"
            assert "retry-after" in refused.headers
            stalled.set()
        assert sorted(answer.status_code for answer in answers.values()) == [200, 200, 200, 429]


def test_waiting_for_room_has_an_end(engine: Engine, stalled: threading.Event) -> None:
    limits = Limits(held_tokens=50)
    with serving(engine, settings(queue_timeout_s=0.2, limits=limits)) as live:
        first = live.post(encoded(chat()))
        wait_for(lambda: live.state.admission.num_in_flight == 1)
        late = httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S)
        assert (late.status_code, late.json()["error"]["code"]) == (429, "quota_exceeded")
        never = httpx2.post(live.url + CHAT, json=chat(max_tokens=60), timeout=PATIENCE_S)
        assert (never.status_code, never.json()["error"]["code"]) == (400, "request_too_large")
        stalled.set()
        assert first.recv(12) == b"HTTP/1.1 200"
        first.close()


def test_requests_of_a_tenant_are_bounded(engine: Engine, stalled: threading.Event) -> None:
    with serving(engine, settings(limits=Limits(max_requests=1))) as live:
        first = live.post(encoded(chat()))
        wait_for(lambda: live.state.admission.num_in_flight == 1)
        second = httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "too_many_requests")
        stalled.set()
        assert first.recv(12) == b"HTTP/1.1 200"
        first.close()


def test_grammars_are_prepared_before_somebody_brings_one(live: Live, engine: Engine) -> None:
    """The first request with a schema once waited for a look at the whole vocabulary."""
    wait_for(lambda: "_tokens" in vars(engine.grammars))
