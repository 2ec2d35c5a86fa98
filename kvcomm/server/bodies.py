"""From the bytes of a body to what an operation takes, in a worker thread.

FastAPI reads JSON and validates it on the event loop, where everybody waits meanwhile. Routes of the class here do both
in the server's workers, and hand FastAPI the finished value: its own validation then has nothing left to do. The
OpenAPI document is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from kvcomm.server.errors import ApiError, invalid
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json
from kvcomm.server.logs import notes_of
from kvcomm.server.state import state_of
from kvcomm.server.waiting import client_gone

Validate = Callable[[Any], tuple[Any, Sequence[Any]]]
"""Gives the value that an operation takes, and what is wrong instead."""


class BodyRoute(APIRoute):
    """A route whose body is read by workers; for every router with operations that take JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, on a request that knows how to read its body."""
        handle, field = super().get_route_handler(), self.body_field
        if field is None:
            return handle

        validate = partial(field.validate, loc=("body",))

        async def read_and_handle(request: Request) -> Response:
            return await handle(_ReadByWorkers(request, validate))

        return read_and_handle


class _ReadByWorkers(Request):
    """A request whose `json` is the finished value of its operation's body."""

    def __init__(self, request: Request, validate: Validate) -> None:
        super().__init__(request.scope, request.receive, request._send)
        self._validate = validate

    async def body(self) -> bytes:
        """The bytes.

        Raises:
            ApiError: CLIENT_GONE, the client has disconnected before they had all come.
        """
        try:
            return await super().body()
        except ClientDisconnect:
            raise client_gone() from None

    async def json(self) -> Any:
        """The value.

        Raises:
            ApiError: 400, naming the field at fault.
        """
        body, state = await self.body(), state_of(self)
        caps = JsonCaps().for_context(state.engine.max_context)
        work = partial(read_body, body, self._validate, caps)
        return await state.workers.run(notes_of(self.scope).tenant or "", len(body), work)


def read_body(body: bytes, validate: Validate, caps: JsonCaps) -> Any:
    """The value of a body; raises ApiError 400 for the first thing wrong with it."""
    try:
        value = read_json(body, caps)
    except JsonRefused as error:
        if not error.is_json:
            raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
        where = "the body" if error.param is None else error.param
        message = f"{where} cannot be taken: {error}"
        raise ApiError(400, "invalid_value", message, param=error.param) from error
    made, errors = validate(value)
    if errors:
        raise invalid(errors, value)
    return made
