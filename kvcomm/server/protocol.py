"""uvicorn's HTTP protocol with limits of its own, for clients that have shown no key yet.

Headers have a time to come in, so that a client that sends them byte by byte holds no connection; so has the rest of a
body that was refused before it was read. They have a size, looked at before they are parsed, which is done on the event
loop. And there are only so many connections: when one too many comes, the one goes
that has kept the server waiting longest. Nobody is told apart by address, since behind a proxy all have the same one.
uvicorn itself only limits how long a connection may be idle between requests, and how much of a header may be missing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

MAX_HEADER_BYTES = 32_768
"""Of a request's line and headers."""


class Connections:
    """The connections of one server; those in the middle of a request are never closed for others.

    Attributes:
        most: open at once.
        num_open: now.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_open = 0
        self._silent: dict[asyncio.Transport, None] = {}  # in the order in which the server began to wait for them

    def take(self, transport: asyncio.Transport) -> bool:
        """Count a new connection; False: there is no room for it, and it is closed."""
        self.num_open += 1
        self._silent[transport] = None
        while self.num_open - self._num_closing > self.most:
            longest = next(each for each in self._silent if not each.is_closing())
            longest.abort()
            if longest is transport:
                return False
        return True

    def wait_for(self, transport: asyncio.Transport) -> None:
        """The server waits for a request of it, from now on if it has not before."""
        self._silent.setdefault(transport, None)

    def busy(self, transport: asyncio.Transport) -> None:
        """It is in the middle of a request."""
        self._silent.pop(transport, None)

    def lost(self, transport: asyncio.Transport) -> None:
        """It is gone."""
        self._silent.pop(transport, None)
        self.num_open -= 1

    @property
    def _num_closing(self) -> int:
        return sum(each.is_closing() for each in self._silent)


def limited_protocol(header_timeout_s: float, max_connections: int) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)` that closes connections without complete headers in time."""
    connections = Connections(max_connections)

    class LimitedProtocol(H11Protocol):
        """Holds a timer whenever the server waits for what a client has begun to send, or should begin to."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            if connections.take(transport):
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def handle_events(self) -> None:
            if self.conn.their_state is h11.IDLE:
                received, _ = self.conn.trailing_data
                end = received.find(b"\r\n\r\n")
                if (end if end >= 0 else len(received)) > MAX_HEADER_BYTES:
                    self.send_400_response(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
                    return
            super().handle_events()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._is_in_request and not self.transport.is_closing():
                connections.wait_for(self.transport)
            if self.conn.their_state is h11.SEND_BODY:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            connections.lost(self.transport)
            super().connection_lost(exc)

        @property
        def _is_in_request(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle  # none before the first request, whatever uvicorn says
            return cycle is not None and not cycle.response_complete

        def _watch(self) -> None:
            """Start, keep or end the timer, by whether the server waits."""
            if self._is_in_request:
                connections.busy(self.transport)
                self._stop()
            elif self.transport.is_closing():
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self._close_late)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_late(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
