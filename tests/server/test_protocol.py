"""Connections without a request: only so many, and the one that has kept the server waiting longest goes first."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from kvcomm.engine.engine import Engine
from kvcomm.server.protocol import Connections
from kvcomm.server.settings import ServerSettings
from tests.server.conftest import MODEL, chat
from tests.server.live import PATIENCE_S, Live, read_all, serving, wait_for

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n"


class FakeTransport:
    """A connection that only knows whether it is closed."""

    def __init__(self) -> None:
        self.is_aborted = False

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


def test_the_one_that_has_waited_longest_goes() -> None:
    connections: Any = Connections(3)
    first, second, third, fourth, fifth = (FakeTransport() for _ in range(5))
    assert all(map(connections.take, (first, second, third)))
    connections.busy(first)
    assert connections.take(fourth)
    assert [each.is_aborted for each in (first, second, third, fourth)] == [False, True, False, False]
    connections.lost(second)
    connections.wait_for(first)  # its request is answered: now it waits, and is the last in the queue
    assert connections.take(fifth)
    assert [each.is_aborted for each in (first, third, fourth, fifth)] == [False, True, False, False]


def test_where_all_are_busy_the_new_one_goes() -> None:
    connections: Any = Connections(2)
    first, second, third = (FakeTransport() for _ in range(3))
    for each in (first, second):
        assert connections.take(each)
        connections.busy(each)
    assert not connections.take(third)
    assert (first.is_aborted, second.is_aborted, third.is_aborted) == (False, False, True)
    connections.lost(third)
    assert connections.num_open == 2


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server with few connections and much patience: nothing is closed because of its age."""
    with serving(engine, ServerSettings(model=MODEL, port=0, max_connections=8)) as made:
        yield made


def test_silent_connections_shut_nobody_out(live: Live) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(live.connect()) for _ in range(30)]
        for connection in silent[::2]:
            connection.sendall(HALF[:20])
        for _ in range(3):
            assert httpx2.post(live.url + CHAT, json=chat(), timeout=PATIENCE_S).status_code == 200
        assert _is_closed(silent[0])


def test_who_is_in_a_request_stays(live: Live) -> None:
    with ExitStack() as stack:
        busy = stack.enter_context(live.connect())
        busy.sendall(HALF)
        wait_for(lambda: live.state.admission.num_open == 1)
        for _ in range(20):
            stack.enter_context(live.connect())
        assert httpx2.get(live.url + "/health", timeout=PATIENCE_S).status_code == 200
        busy.sendall(b"x" * 100)
        assert busy.recv(12) == b"HTTP/1.1 400"


def test_a_refused_body_that_never_comes_is_not_waited_for(engine: Engine) -> None:
    """Bug: who was refused before its body was read kept its connection for as long as it sent a byte now and then."""
    with serving(engine, ServerSettings(model=MODEL, port=0, header_timeout_s=0.3)) as live, live.connect() as late:
        late.sendall(HALF.replace(b"localhost", b"elsewhere"))
        answer = read_all(late)
        assert answer.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("at_once", [True, False])
def test_large_headers(live: Live, at_once: bool) -> None:
    """Bug: headers that came in one piece were parsed on the event loop, however large they were."""
    fits, exceeds = (HEALTH[:-2] + b"a: b\r\n" * ((size - len(HEALTH)) // 6) for size in (32_700, 33_000))
    for head, status in ((fits, b"200"), (exceeds, b"400")):
        with live.connect() as connection:
            if at_once:
                connection.sendall(head + b"\r\n")
            else:
                connection.sendall(head[:20_000])
                assert httpx2.get(live.url + "/health", timeout=PATIENCE_S).status_code == 200  # it has been read
                connection.sendall(head[20_000:] + b"\r\n")
            assert connection.recv(12) == b"HTTP/1.1 " + status


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
