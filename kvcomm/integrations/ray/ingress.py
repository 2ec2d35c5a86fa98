"""The ingress: takes HTTP requests whole, finds out where they belong, and passes answers on as they come.

It checks what can be checked before a body is read (hosts, keys, size), as the server's own door does; replicas check
everything again. Answers to what every replica keeps for itself are put together here. Knows replicas only as
`Replicas`, so it needs no Ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import anyio.to_thread
from starlette.datastructures import Headers as HeaderView
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm.integrations.ray.destinations import Destination, Reach, destination_of
from kvcomm.integrations.ray.gathering import listed, metrics_of
from kvcomm.integrations.ray.holding import Recent
from kvcomm.integrations.ray.keys import wanted_of
from kvcomm.integrations.ray.messages import AnswerPart, ForwardedRequest, Head, Tail, Whole, asked_of
from kvcomm.server.access import identify
from kvcomm.server.callers import Callers, cors_of, use_origin_form
from kvcomm.server.draining import DrainedBodies
from kvcomm.server.errors import ApiError
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json
from kvcomm.server.keys import KeyRing
from kvcomm.server.limits import BodyLimit
from kvcomm.server.logs import RequestLog, notes_of
from kvcomm.server.settings import ServerSettings, is_loopback
from kvcomm.server.workers import LONG_BYTES

logger = logging.getLogger("kvcomm.ray")

MAX_TRIES = 3
"""Replicas that may die under one request."""

MAX_VERSIONS = 32_768
"""Contexts whose last version is remembered."""

EVENTS = "text/event-stream"


class ReplicaDied(Exception):
    """The replica is gone, before or while it answered."""


class Replicas(Protocol):
    """What can be asked."""

    def one(self, asked: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """The answer of the replica that the router chooses; raises ReplicaDied."""

    async def every(self, asked: ForwardedRequest) -> list[Whole]:
        """The answers of all that live."""


def make_ingress(settings: ServerSettings, replicas: Replicas) -> ASGIApp:
    """The ingress's app.

    Raises:
        KeyFileError: the settings name a key file that cannot be read.
    """
    keys = None if settings.keys is None else KeyRing(settings.keys)
    inner = Proxy(settings, replicas)
    limited = BodyLimit(
        inner, max_bytes=settings.max_bytes_of, timeout_s=settings.body_timeout_s, pause_s=settings.body_pause_s
    )
    callers = Callers(
        allowed_hosts=settings.allowed_hosts, cors_origins=settings.cors_origins, has_keys=keys is not None
    )
    app: ASGIApp = Gate(limited, keys, callers)
    if settings.cors_origins:
        app = CORSMiddleware(app, **cors_of(settings))
    return DrainedBodies(RequestLog(app, observe=lambda ended: None))


class Gate:
    """ASGI middleware: whose request it is, before its body is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, callers: Callers) -> None:
        self._app = app
        self._keys = keys
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        use_origin_form(scope)
        try:
            if self._keys is None:
                _require_local(scope)
            scope["state"]["tenant"] = identify(scope, self._keys, self._callers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Proxy:
    """ASGI app: passes requests on to replicas."""

    def __init__(self, settings: ServerSettings, replicas: Replicas) -> None:
        self._may_move = settings.max_divergence > 0
        self._replicas = replicas
        self._versions = Recent(MAX_VERSIONS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _body(receive)
            work = partial(self._asked, scope, body)
            asked, destination = await anyio.to_thread.run_sync(work) if len(body) > LONG_BYTES else work()
            if destination.reach is Reach.ONE:
                await self._pass_on(asked, send)
            else:
                await _send_whole(await self._gathered(asked, destination), send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    def _asked(self, scope: Scope, body: bytes) -> tuple[ForwardedRequest, Destination]:
        tenant: str | None = scope["state"]["tenant"]
        values = _object(body)
        destination = destination_of(scope["method"], scope["path"], values)
        context_id = destination.context_id
        version = None if context_id is None else self._versions.get(_plain(context_id))
        asked = asked_of(
            scope,
            body,
            request_id=notes_of(scope).request_id,
            tenant=tenant,
            context_id=context_id,
            changes=destination.changes,
            wanted=wanted_of(values, tenant=tenant or "", may_move=self._may_move),
            version=None if version is None else int(version),
        )
        return asked, destination

    async def _pass_on(self, asked: ForwardedRequest, send: Send) -> None:
        """Send the answer of one replica; of another one if the first dies before it has said anything."""
        for _ in range(MAX_TRIES):
            begun = _Begun(send)
            try:
                async with aclosing(self._replicas.one(asked)) as parts:
                    async for part in parts:
                        if isinstance(part, Tail):
                            self._remember(part)
                        await begun.put(part)
                return
            except ReplicaDied:
                logger.warning("a replica died under %s %s", asked.method, asked.path)
                if begun.is_begun:
                    await begun.break_off()
                    return
                asked = replace(asked, is_again=True)
        message = f"{MAX_TRIES} replicas died one after the other while they had the request"
        raise ApiError(503, "replica_lost", message, retry_after_s=1)

    def _remember(self, tail: Tail) -> None:
        for context_id, version in tail.versions.items():
            self._versions.put(context_id, str(version))

    async def _gathered(self, asked: ForwardedRequest, destination: Destination) -> Whole:
        answers = await self._replicas.every(asked)
        if not answers:
            raise ApiError(503, "no_replica", "no replica is ready; try again", retry_after_s=1)
        failed = next((each for each in answers if each.status >= 300), None)
        if destination.reach is Reach.METRICS and failed is None:
            return metrics_of(answers)
        if destination.reach is Reach.LISTED and failed is None:
            return listed(answers)
        return failed or answers[0]


class _Begun:
    """An answer on its way to the client. Its head waits for what follows: until then nothing has been said."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Head | None = None
        self.is_begun = False

    async def put(self, part: AnswerPart) -> None:
        """Send a part."""
        if isinstance(part, Head):
            self._head = part
            return
        if self._head is not None and not self.is_begun:
            self.is_begun = True
            await self._send(
                {"type": "http.response.start", "status": self._head.status, "headers": self._head.headers}
            )
        is_last = isinstance(part, Tail)
        await self._send(
            {"type": "http.response.body", "body": b"" if isinstance(part, Tail) else part, "more_body": not is_last}
        )

    async def break_off(self) -> None:
        """End what cannot be completed: events can say so, all else is cut off.

        Raises:
            ConnectionResetError: the client sees that too.
        """
        assert self._head is not None, "begun"
        if not HeaderView(raw=self._head.headers).get("content-type", "").startswith(EVENTS):
            raise ConnectionResetError("the replica that answered is gone")
        error = ApiError(503, "replica_lost", "the replica that answered is gone; ask again", retry_after_s=1)
        event = f"data: {json.dumps(error.body)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message: Message = await receive()
        if message["type"] != "http.request":
            raise ConnectionResetError("the client has disconnected")
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _object(body: bytes) -> Mapping[str, Any]:
    """A body's JSON object; empty for everything else, about which the replica will say what is wrong."""
    if body.lstrip()[:1] != b"{":
        return {}
    try:
        value = read_json(body, JsonCaps())
    except JsonRefused:
        return {}
    return value if isinstance(value, dict) else {}


async def _send_whole(answer: Whole, send: Send) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})


def _require_local(scope: Scope) -> None:
    """Raises ApiError 403 for callers from elsewhere: without keys everybody would be the one tenant."""
    client = scope.get("client")
    if client and not is_loopback(client[0]):
        message = "without keys only callers on this machine are served: give the app keys=FILE"
        raise ApiError(403, "keys_needed", message)


def _plain(context_id: str) -> str:
    """The id of the context of a response, or of a context."""
    return f"ctx_{context_id.partition('_')[2]}"
