"""Server-sent events: one JSON object per event, `[DONE]` at the end, errors as an event once the headers are out.

Written on starlette's response: an event stream with a library of its own would be cut off by that library as soon as
the server begins to drain, and drained streams are to end by themselves.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
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

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, server-sent events that each hold a chunk, then `[DONE]`.",
        "content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}},
    }
}


class EventStream(StreamingResponse):
    """A stream of events, stopped when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[BaseModel, None], *, deadline_s: float) -> None:
        """`deadline_s` is when the events end by themselves, on the loop's clock."""
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

    async def _encode(self, events: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[str, None]:
        async with aclosing(events):
            try:
                async for each in events:
                    yield event(each)
            except ApiError as error:  # the status is out already
                self._error = error
                yield event(error.body)
                return
        yield DONE


def event(data: BaseModel | dict[str, Any]) -> str:
    """One event."""
    text = data.model_dump_json(exclude_unset=True) if isinstance(data, BaseModel) else json.dumps(data)
    return f"data: {text}\n\n"
