"""The answers to one chat request, as neutral events: what chat completions and the other APIs are made from.

A surface translates its request into a `ChatRequest`, begins it here, and writes what comes in its own words. Streamed
and whole answers are read by the same reader.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.contexts.answering import begin_turn, put_messages
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.generation import Call, Job
from kvcomm.server.sampling import num_breakpoints, policy_of, sampling_of
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.usage import Usage
from kvcomm.server.usage import usage_of
from kvcomm.toolcalls.events import Answer, Event, Finish, TextDelta


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

    def __init__(self, body: ChatRequest, call: Call) -> None:
        self._body = body
        self._call = call

    @classmethod
    async def begin(cls, body: ChatRequest, call: Call, *, turn: Turn | None = None) -> ChatAnswers:
        """Render, tokenize and submit a request.

        Args:
            turn: on a context, where the caller has begun one; else the body's `context_id` says which.

        Raises:
            ApiError, KVCommError: it is refused; `Call.guard` makes one kind of them.
        """
        state = call.state
        adapter = state.adapter_of(body.model)
        turn = turn or begin_turn(body, adapter, call)
        if turn is None:
            prompt = await call.make(
                partial(state.prompts.chat, body, call.tenant.name),
                more_bytes=state.registries.num_bytes(call.tenant.name, body.segments or ()),
            )
        else:
            prompt = await call.make(partial(put_messages, turn, body, state.prompts), more_bytes=turn.num_rendered)
        sampling = sampling_of(
            body,
            state.settings,
            num_prompt_tokens=prompt.num_tokens,
            max_context=state.engine.max_context,
            wanted_tokens=body.wanted_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        salt = body.cache_salt if turn is None else turn.salt
        await call.submit(Job(prompt, sampling, policy_of(body, state.settings), salt, turn, adapter))
        return cls(body, call)

    async def events(self) -> AsyncGenerator[ChoiceEvents, None]:
        """The events of all choices as they come; each ends with its `Finish`. Raises as `Call.pieces`."""
        async with aclosing(self._call.pieces()) as pieces:
            async for piece in pieces:
                chunk = piece.chunk
                events: list[Event] = [TextDelta(chunk.text)] if chunk.text else []
                if chunk.finish_reason is not None:
                    events.append(Finish("stop" if chunk.finish_reason == "stop" else "length"))
                yield ChoiceEvents(chunk.choice, tuple(events), chunk.logprobs)

    async def usage(self) -> Usage:
        """Of the request, once it has ended."""
        return usage_of([(await self._call.results())[0].usage], cache_breakpoints=num_breakpoints(self._body))
