"""Requests that are answered before their body has come in full: too large, no key, a full server.

A connection that is closed while bytes wait in it is reset, and whoever was still sending never reads why it was
refused. So the answer goes out first, and then some of what still comes is read and thrown away: at most about
`DRAIN_BYTES`, for at most `DRAIN_S`, holding no place. Unless the body is small, the connection is closed then.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAIN_BYTES = 16 * 2**20
DRAIN_S = 2.0
SMALL_BYTES = 64 * 2**10
"""A body of so many bytes is read to its end to keep the connection; a new one would cost more."""


class DrainedBodies:
    """ASGI middleware, the outermost: whatever stands further in has ended when a body is drained."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _brings_body(headers := Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        body = _Body(headers, receive)
        is_held = False

        async def send_but_the_end(message: Message) -> None:
            nonlocal is_held
            if message["type"] == "http.response.start" and not body.is_over and not body.is_small:
                MutableHeaders(scope=message)["connection"] = "close"
            elif message["type"] == "http.response.body" and not message.get("more_body", False) and not body.is_over:
                is_held, message = True, {**message, "more_body": True}
            await send(message)

        await self._app(scope, body.receive, send_but_the_end)
        if is_held:
            await body.drain()
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """How much of a request's body has come."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        declared = headers.get("content-length", "")
        self.is_small = declared.isdecimal() and int(declared) <= SMALL_BYTES
        self.is_over = False
        self._is_announced = headers.get("expect", "").lower() == "100-continue"
        self._receive = receive

    async def receive(self) -> Message:
        """The next message; who asks for it tells the client to go on."""
        self._is_announced = False
        message = await self._receive()
        self.is_over = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read and forget a part of the rest; nothing where the client waits to be asked for it."""
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while not self.is_over and not self._is_announced and num_bytes < DRAIN_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))


def _brings_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
