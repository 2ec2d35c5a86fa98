"""An HTTP request and its answer between two processes, and an ASGI app that is asked that way.

A request travels whole: its body was read by the ingress, which must look into it to route it. An answer comes in
parts, a head and then bytes, so that a stream is passed on while it is written. Knows nothing about Ray.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from kvcomm.integrations.ray.routing import Wanted
from kvcomm.server.logs import REQUEST_ID

Headers = list[tuple[bytes, bytes]]

MAX_WAITING = 16
"""Parts of an answer that wait for a slow client; then the app waits."""


@dataclass(frozen=True)
class ForwardedRequest:
    """A request as the ingress received it.

    Attributes:
        path, raw_path, query: as ASGI has them.
        headers: names in lower case.
        client, server: addresses and ports, as ASGI has them.
        tenant: whose key it carries; None: it is nobody's.
        context_id: of the context, or response, that it is about; None: no certain one.
        wanted: what replicas could hold of it.
        changes: that context.
        version: of that context, as the ingress knows it; None: unknown. An older one must not answer.
        nonce: of this request alone, whatever id its client gave it.
        is_again: a replica died while it had the request; what that one made of the context is not to count.
    """

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    body: bytes = b""
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    scheme: str = "http"
    tenant: str | None = None
    context_id: str | None = None
    changes: bool = False
    wanted: Wanted = field(default_factory=lambda: Wanted(0))
    version: int | None = None
    nonce: str = ""
    is_again: bool = False


class Head(NamedTuple):
    """How an answer begins."""

    status: int
    headers: Headers


class Tail(NamedTuple):
    """The end of an answer; `versions` are those of the contexts that changed with it, by id."""

    versions: dict[str, int]


AnswerPart = Head | bytes | Tail
"""An answer is one head, then bytes, then a tail."""


class Whole(NamedTuple):
    """An answer in one piece; `replica` gave it."""

    replica: str
    status: int
    headers: Headers
    body: bytes


def asked_of(scope: Scope, body: bytes, *, request_id: str, **more: Any) -> ForwardedRequest:
    """What a scope says, as a request that can travel; `more` are further fields."""
    path: str = scope["path"]
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != REQUEST_ID.encode()]
    return ForwardedRequest(
        method=scope["method"],
        path=path,
        raw_path=scope.get("raw_path") or path.encode(),
        query=scope.get("query_string", b""),
        headers=[*headers, (REQUEST_ID.encode(), request_id.encode())],
        body=body,
        client=_address(scope.get("client")),
        server=_address(scope.get("server")),
        scheme=scope.get("scheme", "http"),
        nonce=uuid.uuid4().hex,
        **more,
    )


def _address(value: Any) -> Any:
    return None if value is None else tuple(value)


def scope_of(asked: ForwardedRequest) -> Scope:
    """The ASGI scope that an app is called with for a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": asked.scheme,
        "path": asked.path,
        "raw_path": asked.raw_path,
        "query_string": asked.query,
        "root_path": "",
        "headers": asked.headers,
        "client": asked.client,
        "server": asked.server,
        "state": {},
    }


async def answer(app: ASGIApp, asked: ForwardedRequest) -> AsyncGenerator[Message, None]:
    """An app's answer to a request, as ASGI messages.

    Leaving the iteration early is the client's disconnect: the app is told, and waited for.

    Raises:
        Exception: what the app raises.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(MAX_WAITING)
    is_gone = asyncio.Event()
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": asked.body, "more_body": False}
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not is_gone.is_set():
            await messages.put(message)

    async def run() -> None:
        try:
            await app(scope_of(asked), receive, send)
        finally:
            if not is_gone.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        is_gone.set()
        while not messages.empty():  # whoever waits to put something may go on
            messages.get_nowait()
        if not task.done():
            with suppress(Exception):
                await asyncio.shield(task)
