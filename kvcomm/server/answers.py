"""The answers to one chat request, as neutral events: what chat completions and the other APIs are made from.

A surface translates its request into a `ChatRequest`, begins it here, and writes what comes in its own words. Streamed
and whole answers are read by the same reader.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.generation import Call
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.usage import Usage
from kvcomm.toolcalls.events import Answer, Event


class ChoiceEvents(NamedTuple):
    """What a piece of one choice brings; there may be tokens without an event, as long as their text is held back."""

    choice: int
    events: tuple[Event, ...]
    logprobs: tuple[TokenLogprob, ...] | None


class ChoiceAnswer(NamedTuple):
    """A whole choice."""

    choice: int
    answer: Answer
    logprobs: tuple[TokenLogprob, ...] | None


class ChatAnswers:
    """A chat request in the engine."""

    @classmethod
    async def begin(cls, body: ChatRequest, call: Call) -> ChatAnswers:
        """Render, tokenize and submit a request.

        Raises:
            ApiError, KVCommError: it is refused; `Call.guard` makes one kind of them.
        """
        raise NotImplementedError

    async def events(self) -> AsyncGenerator[ChoiceEvents, None]:
        """The events of all choices as they come; each ends with its `Finish`. Raises as `Call.pieces`."""
        raise NotImplementedError
        yield

    async def whole(self) -> list[ChoiceAnswer]:
        """All choices, once they have ended. Raises as `Call.results`."""
        raise NotImplementedError

    async def usage(self) -> Usage:
        """Of the request, once it has ended."""
        raise NotImplementedError
