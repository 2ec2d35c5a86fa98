"""Server-sent events: one JSON object per event, errors as an event once the headers are out.

How events are written is the API's matter: OpenAI's older ones have no names and end with `[DONE]`, others have names.

Written on starlette's response: an event stream with a library of its own would be cut off by that library as soon as
the server begins to drain, and drained streams are to end by themselves.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvcomm.server.errors import ApiError
from kvcomm.server.logs import notes_of
from kvcomm.server.waiting import while_connected

DONE = "data: [DONE]\n\n"
GRACE_S = 5.0
"""After the deadline: for a client to take the last event, before a stream that nobody reads is dropped."""

EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


def documented_stream(description: str) -> dict[int | str, dict[str, Any]]:
    """The success of an operation that may answer with a stream, for its OpenAPI document."""
    return {200: {"description": description, "content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}}}


DOCUMENTED = documented_stream("The answer; with `stream`, server-sent events that each hold a chunk, then `[DONE]`.")


EventBody = BaseModel | dict[str, Any]


@dataclass(frozen=True)
class Wire:
    """How the events of an API are written.

    Attributes:
        event: writes one of them.
        error: the event that tells an error, which is then the last one.
        end: written at the end of a stream without an error.
    """

    event: Callable[[EventBody], str]
    error: Callable[[ApiError], EventBody]
    end: str = ""


class EventStream(StreamingResponse):
    """A stream of events, stopped when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[EventBody, None], *, deadline_s: float, wire: Wire | None = None) -> None:
        """Make one.

        Args:
            deadline_s: when the events end by themselves, on the loop's clock.
            wire: by default that of OpenAI's older APIs.
        """
        self._wire = wire or UNNAMED
        self._encoded = self._encode(events)
        self._deadline_s = deadline_s
        self._error: ApiError | None = None
        super().__init__(self._encoded, headers={"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = notes_of(scope)
        async with aclosing(self._encoded):
            try:
                await while_connected(receive, self.stream_response(send), deadline_s=self._deadline_s + GRACE_S)
            except ApiError as error:  # nobody is left, or nobody reads: there is no one to tell
                notes.stopped = error.code
        notes.error = self._error

    async def _encode(self, events: AsyncGenerator[EventBody, None]) -> AsyncGenerator[str, None]:
        wire = self._wire
        async with aclosing(events):
            try:
                async for each in events:
                    yield wire.event(each)
            except ApiError as error:  # the status is out already
                self._error = error
                yield wire.event(wire.error(error))
                return
        if wire.end:
            yield wire.end


def event(data: EventBody) -> str:
    """One event without a name."""
    text = data.model_dump_json(exclude_unset=True) if isinstance(data, BaseModel) else json.dumps(data)
    return f"data: {text}\n\n"


def named_event(data: EventBody) -> str:
    """One event, named by its `type`."""
    values = data.model_dump() if isinstance(data, BaseModel) else data
    return f"event: {values['type']}\ndata: {json.dumps(values)}\n\n"


UNNAMED = Wire(event, lambda error: error.body, DONE)
