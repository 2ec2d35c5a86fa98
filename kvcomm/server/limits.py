"""How much of a body is taken, and how long it may take to come; the same for chunked bodies, which state no length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm.server.errors import CLOSE, ApiError
from kvcomm.server.logs import notes_of

MAX_DIGITS = 18
"""Of a declared length; a longer one is too large whatever it says."""


class BodyLimit:
    """ASGI middleware: 413 for a body over `max_bytes` of its path, 408 for one that is late.

    Late is a body that is not complete after `timeout_s`, or of which nothing came for `pause_s`.

    A declared length is refused before anything is read, everything else as soon as it exceeds the limit: no more than
    that is ever held. The connection is closed then: what comes after an unread body cannot be told from it.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: Callable[[str], int], timeout_s: float, pause_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._pause_s = pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_bytes(scope["path"])
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
            error = _too_large(max_bytes)
            notes_of(scope).error = error
            await error.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive, max_bytes), send)

    def _limited(self, receive: Receive, max_bytes: int) -> Receive:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        num_bytes, is_complete = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:  # what still comes is the disconnect, however late
                return await receive()
            pause_ends_s = loop.time() + self._pause_s
            try:
                async with asyncio.timeout_at(min(deadline_s, pause_ends_s)):
                    message = await receive()
            except TimeoutError:
                text = f"the body was not complete after {self._timeout_s:g} s"
                if pause_ends_s < deadline_s:
                    text = f"nothing came of the body for {self._pause_s:g} s, and it is not complete"
                raise ApiError(408, "body_timeout", text, headers=CLOSE) from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            is_complete = not message.get("more_body", False)
            return message

        return limited


def _too_large(max_bytes: int) -> ApiError:
    text = f"the body is larger than {max_bytes} bytes, the most that this server takes"
    return ApiError(413, "body_too_large", text, headers=CLOSE)
