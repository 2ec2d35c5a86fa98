"""A real uvicorn on a free loopback port, in a thread of the test."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI

from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing
from kvcomm.server.logs import JsonFormatter
from kvcomm.server.running import DrainingServer, bind, make_server
from kvcomm.server.settings import ServerSettings
from kvcomm.server.state import ServerState

PATIENCE_S = 30.0


class Live(NamedTuple):
    """A running server, and what it logs."""

    server: DrainingServer
    state: ServerState
    port: int
    log: list[dict[str, Any]]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def post(self, body: bytes, path: str = "/v1/chat/completions") -> socket.socket:
        """A raw connection with a request sent, its answer not read."""
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection = self.connect()
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return connection


class _Kept(logging.Handler):
    """Keeps log lines as they are written."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(json.loads(self.format(record)))


@contextmanager
def serving(engine: Engine, settings: ServerSettings, *, keys: KeyRing | None = None) -> Iterator[Live]:
    """A server for a `with` statement; it is drained at the end, and nothing may hang."""
    app: FastAPI = make_app(engine, settings, keys=keys)
    listener = bind(settings)
    server = make_server(app)
    log: list[dict[str, Any]] = []
    handler, logger = _Kept(log), logging.getLogger("kvcomm.server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="uvicorn")
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Live(server, app.state.kvcomm, listener.getsockname()[1], log)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not end"
        app.state.kvcomm.contexts.close()
        logger.removeHandler(handler)
        logger.setLevel(level)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds; fails after a time that only a hang exceeds."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def read_all(connection: socket.socket) -> bytes:
    """What a server still sends before it closes a connection."""
    data = b""
    while piece := connection.recv(65_536):
        data += piece
    return data
