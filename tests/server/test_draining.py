"""Who is refused in the middle of sending reads why: on real sockets, as clients do that send first and then read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from kvcomm.engine.engine import Engine
from kvcomm.server import draining
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import Limits, ServerSettings
from tests.server.conftest import MODEL, Keys
from tests.server.live import PATIENCE_S, Live, read_all, serving, wait_for

CHAT = "/v1/chat/completions"
MEGABYTE = 2**20


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time to send everything, on however slow a machine."""
    monkeypatch.setattr(draining, "DRAIN_S", PATIENCE_S)


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with serving(engine, ServerSettings(model=MODEL, port=0, max_body_bytes=MEGABYTE)) as server:
        yield server


@pytest.fixture
def secured(engine: Engine, keys: Keys, key_file: Any) -> Iterator[Live]:
    settings = ServerSettings(model=MODEL, port=0, header_timeout_s=0.5, limits=Limits(requests_per_minute=1))
    with serving(engine, settings, keys=KeyRing(key_file)) as server:
        yield server


def head(*lines: str) -> bytes:
    """A request's headers."""
    first = (f"POST {CHAT} HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def sent(live: Live, num_bytes: int, *lines: str, chunked: bool = False) -> tuple[int, bytes]:
    """Status and rest of the answer, read once all is sent; a reset on the way is an error."""
    with closing(live.connect()) as connection:
        if chunked:
            connection.sendall(head("transfer-encoding: chunked", *lines))
            for _ in range(num_bytes // MEGABYTE):
                connection.sendall(b"100000\r\n" + b"x" * MEGABYTE + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        else:
            connection.sendall(head(f"content-length: {num_bytes}", *lines))
            connection.sendall(b"x" * num_bytes)
        answer = read_all(connection)
        return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(live: Live, chunked: bool) -> None:
    status, answer = sent(live, 12 * MEGABYTE, chunked=chunked)
    assert status == 413
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_without_a_key(secured: Live, chunked: bool) -> None:
    assert sent(secured, 3 * MEGABYTE, chunked=chunked)[0] == 401


@pytest.mark.usefixtures("patient")
def test_a_body_over_the_rate(secured: Live, keys: Keys) -> None:
    key = f"authorization: Bearer {keys['ann']}"
    sent(secured, 0, key, "connection: close")
    status, answer = sent(secured, 3 * MEGABYTE, key)
    assert (status, b"retry-after" in answer) == (429, True)


@pytest.mark.usefixtures("patient")
def test_a_body_for_nothing(live: Live) -> None:
    with closing(live.connect()) as connection:
        connection.sendall(head(f"content-length: {MEGABYTE}").replace(CHAT.encode(), b"/nothing"))
        connection.sendall(b"x" * MEGABYTE)
        assert read_all(connection).startswith(b"HTTP/1.1 404")


def test_not_more_than_a_little_is_drained(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless body is cut off, by its bytes."""
    monkeypatch.setattr(draining, "DRAIN_BYTES", MEGABYTE)
    monkeypatch.setattr(draining, "DRAIN_S", PATIENCE_S)
    with closing(live.connect()) as connection:
        connection.sendall(head("transfer-encoding: chunked"))
        piece = b"100000\r\n" + b"x" * MEGABYTE + b"\r\n"
        with pytest.raises(ConnectionError):
            connection.sendall(piece * 200)


def test_not_longer_than_a_little_is_drained(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops sending is left, and holds no place meanwhile."""
    monkeypatch.setattr(draining, "DRAIN_S", 0.2)
    with closing(live.connect()) as connection:
        connection.sendall(head("content-length: 100000000") + b"x" * 1000)
        assert connection.recv(12) == b"HTTP/1.1 413"
        wait_for(lambda: live.state.admission.num_open == 0)
        read_all(connection)  # it ends


def test_no_place_is_held_while_draining(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "DRAIN_S", PATIENCE_S)
    with closing(live.connect()) as connection:
        connection.sendall(head("transfer-encoding: chunked") + b"200000\r\n" + b"x" * (2 * MEGABYTE))
        assert connection.recv(12) == b"HTTP/1.1 413"
        wait_for(lambda: live.state.admission.num_open == 0)
        wait_for(lambda: any(line.get("status") == 413 for line in live.log))
        connection.sendall(b"\r\n0\r\n\r\n")
        read_all(connection)


def test_who_asks_first_sends_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "DRAIN_S", 10 * PATIENCE_S)
    with closing(live.connect()) as connection:
        connection.sendall(head("content-length: 100000000", "expect: 100-continue"))
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"100 Continue" not in answer


def answer_of(connection: socket.socket) -> bytes:
    """One answer with a stated length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    found = data.lower().partition(b"content-length: ")[2]
    wanted = len(data.partition(b"\r\n\r\n")[0]) + 4 + int(found.partition(b"\r\n")[0])
    while len(data) < wanted:
        data += connection.recv(65_536)
    return data


def test_a_small_body_keeps_its_connection(secured: Live) -> None:
    with closing(secured.connect()) as connection:
        for _ in range(2):
            connection.sendall(head("content-length: 2") + b"{}")
            answer = answer_of(connection)
            assert answer.startswith(b"HTTP/1.1 401")
            assert b"connection: close" not in answer.lower()


def test_a_small_body_that_never_comes_holds_no_connection(secured: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then kept it open for ever: uvicorn only closes what is silent."""
    monkeypatch.setattr(draining, "DRAIN_S", 0.1)
    with closing(secured.connect()) as connection:
        connection.sendall(head("content-length: 60000"))
        assert answer_of(connection).startswith(b"HTTP/1.1 401")
        connection.settimeout(0.05)

        def is_cut_off() -> bool:
            try:
                connection.sendall(b"x")
                return connection.recv(10) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_for(is_cut_off)
