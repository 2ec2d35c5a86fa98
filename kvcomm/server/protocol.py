"""uvicorn's HTTP protocol with a time limit on headers, and on bodies that nobody reads any more.

A client that sends them byte by byte holds no connection. uvicorn itself only limits how long a connection may be idle
between requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def limited_protocol(header_timeout_s: float) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)` that closes connections without complete headers in time.

    What is left of a body whose request has been answered has the same time.
    """

    class LimitedProtocol(H11Protocol):
        """Holds a timer whenever a client has begun to talk, and nobody listens before its next request's headers."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._header_timer: asyncio.TimerHandle | None = None
            self._awaited: object = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start, keep or end the timer, by what is awaited: headers, or the end of a body that comes too late."""
            theirs = self.conn.their_state
            is_ignored = theirs is h11.SEND_BODY and self.cycle.response_complete
            awaited = theirs if theirs is h11.IDLE or is_ignored else None
            if awaited is not self._awaited or self.transport.is_closing():
                self._stop()
            self._awaited = awaited
            if awaited is not None and self._header_timer is None and not self.transport.is_closing():
                self._header_timer = self.loop.call_later(header_timeout_s, self._close_late)

        def _stop(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _close_late(self) -> None:
            self._header_timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
