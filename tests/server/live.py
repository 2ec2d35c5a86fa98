"""A real uvicorn on a free loopback port, in a thread of the test.

Its limits of time are out of reach unless a test sets them. A test of such a limit lets the server's clock jump over it
(`Live.skip`) and does not wait for it: neither a slow machine nor a fast one changes what is seen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI

from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.keys import KeyRing
from kvcomm.server.listening import bind
from kvcomm.server.logs import JsonFormatter
from kvcomm.server.running import DrainingServer, make_server
from kvcomm.server.settings import ServerSettings
from kvcomm.server.state import ServerState
from tests.limits import PATIENCE_S, threads, wait_for

TIME_LIMITS = (
    "header_timeout_s",
    "body_timeout_s",
    "keep_alive_s",
    "request_timeout_s",
    "queue_timeout_s",
    "drain_timeout_s",
)


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can put forward."""

    skipped_s = 0.0

    def time(self) -> float:
        """Seconds, by which all its timers run."""
        return super().time() + self.skipped_s

    def skip(self, seconds: float) -> None:
        """Put the clock forward; in the loop's own thread."""
        self.skipped_s += seconds


class Live(NamedTuple):
    """A running server, and what it logs."""

    server: DrainingServer
    state: ServerState
    port: int
    log: list[dict[str, Any]]
    loop: SkippingLoop

    def skip(self, seconds: float = PATIENCE_S + 1) -> None:
        """As if that time had passed: by default more than any limit that a test has not set."""
        self.loop.call_soon_threadsafe(self.loop.skip, seconds)

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
    settings = settings.model_copy(
        update={name: int(PATIENCE_S) for name in TIME_LIMITS if name not in settings.model_fields_set}
    )
    app: FastAPI = make_app(engine, settings, keys=keys)
    listener = bind(settings)
    server, loop = make_server(app), SkippingLoop()
    log: list[dict[str, Any]] = []
    handler, logger = _Kept(log), logging.getLogger("kvcomm.server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets=[listener]))

    try:
        with threads(serve):
            try:
                wait_for(lambda: server.started)
                yield Live(server, app.state.kvcomm, listener.getsockname()[1], log, loop)
            except BaseException:
                server.force_exit = True  # what is still in flight may be waiting for the test that has failed
                raise
            finally:
                server.should_exit = True
    finally:
        app.state.kvcomm.contexts.close()
        logger.removeHandler(handler)
        logger.setLevel(level)


def read_all(connection: socket.socket) -> bytes:
    """What a server still sends before it closes a connection."""
    data = b""
    try:
        while piece := connection.recv(65_536):
            data += piece
    except ConnectionResetError:  # how it ends where the server had not read all that was sent
        pass
    return data
