"""One response from its request to its end: begun in the engine, told whole or as a stream, stored if it is to be."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from kvcomm.server.answers import ChatAnswers, ChoiceEvents
from kvcomm.server.contexts.conversation import NOT_CONTINUED
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.errors import ApiError
from kvcomm.server.generation import GenerationCall
from kvcomm.server.logprobs import told_logprobs
from kvcomm.server.responses.keeping import QUOTA_EXCEEDED, ResponsePlace, Stored, find, response_id
from kvcomm.server.responses.output import EventFields, Output
from kvcomm.server.responses.translation import chat_request, items_of
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseError,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
)
from kvcomm.server.schemas.usage import UsageObject

NOT_KEPT = frozenset({"conversation_too_large", QUOTA_EXCEEDED})
"""Codes of errors about messages that a context would keep."""


class ResponseAnswer:
    """A request in the engine, and the response that comes of it."""

    def __init__(self, body: ResponseRequest, call: GenerationCall) -> None:
        self._body = body
        self._call = call
        self._id = response_id(call.state.contexts.new_id, body.previous_response_id)
        self._output = Output()
        self._num_told = 0
        self._past: Stored | None = None
        self._place: ResponsePlace | None = None
        self._turn: Turn | None = None
        self._answers: ChatAnswers | None = None

    async def begin(self) -> None:
        """Find what it follows, find a place where it will be kept, and submit it.

        Raises:
            ApiError, KVCommError: it is refused.
        """
        body, call = self._body, self._call
        if body.previous_response_id is not None:
            self._past = find(call.state.contexts.of(call.tenant), body.previous_response_id, is_previous=True)
        self._place = place = ResponsePlace.find(call, body.store)
        try:
            self._answers = await self._submit()
        except ApiError as error:
            if place is None or not place.is_spare or error.code not in NOT_KEPT or error.param != "messages":
                raise
            place.give_back()
            self._place = None
            self._answers = await self._submit()
        call.known_as(self._id)

    async def whole(self) -> ResponseObject:
        """The response, once it is complete."""
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                self._fed(piece)
        return await self._end()

    async def pieces(self) -> AsyncGenerator[ChoiceEvents, None]:
        """What comes, to be given to `events`."""
        assert self._answers is not None, "begun"
        async with aclosing(self._answers.events()) as pieces:
            async for piece in pieces:
                yield piece

    async def events(
        self, first: ChoiceEvents | None, rest: AsyncGenerator[ChoiceEvents, None]
    ) -> AsyncGenerator[EventFields, None]:
        """The events of its stream."""
        begun = self._object("in_progress").model_dump()
        for kind in ("response.created", "response.in_progress"):
            yield self._numbered({"type": kind, "response": begun})
        async with aclosing(rest):
            if first is not None:
                for told in self._fed(first):
                    yield told
            async for piece in rest:
                for told in self._fed(piece):
                    yield told
        ended = await self._end()
        yield self._numbered({"type": f"response.{ended.status}", "response": ended.model_dump()})

    def failure(self, error: ApiError) -> EventFields:
        """The last event of a stream that ends with an error."""
        self._place = None
        code = "rate_limit_exceeded" if error.status_code == 429 else "server_error"
        failed = self._object("failed", error=ResponseError(code=code, message=error.detail))
        return self._numbered({"type": "response.failed", "response": failed.model_dump()})

    async def _submit(self) -> ChatAnswers:
        if self._past is not None:
            shown = await self._made(partial(self._past.is_shown_as, self._body))
            if shown:
                try:
                    return await self._begin_behind(self._past)
                except ApiError as error:
                    if error.code != NOT_CONTINUED:
                        raise
        return await self._begin_anew()

    async def _begin_behind(self, past: Stored) -> ChatAnswers:
        """Continue the context of the response before this one."""
        chat = await self._made(partial(chat_request, self._body, items_of(self._body), is_whole=False))
        registry = self._call.state.contexts.of(self._call.tenant)
        return await self._start(chat, registry.turn_behind(past.node, keeps=self._place is not None))

    async def _begin_anew(self) -> ChatAnswers:
        """Write the whole conversation."""
        chat = await self._made(self._whole_chat)
        if self._place is None:
            return await self._start(chat, None)
        call = self._call
        adapter = call.state.adapter_of(chat.model)
        space = call.state.tenants.open_namespace(call.tenant, chat.cache_salt)
        context = call.state.engine.empty_context(adapter=adapter, tenant=space)
        return await self._start(chat, call.state.contexts.of(call.tenant).new_turn(context, salt=chat.cache_salt))

    def _whole_chat(self) -> ChatRequest:
        past = self._past
        chat = chat_request(self._body, [*(() if past is None else past.items), *items_of(self._body)])
        return chat if past is None else chat.model_copy(update={"cache_salt": past.node.salt})

    async def _start(self, chat: ChatRequest, turn: Turn | None) -> ChatAnswers:
        self._turn = None if turn is None else self._call.take_turn(turn)
        return await ChatAnswers.begin(chat, self._call, turn=self._turn)

    async def _made(self, maker: Any) -> Any:
        return await self._call.make(maker, more_bytes=0 if self._past is None else self._past.num_bytes)

    async def _end(self) -> ResponseObject:
        assert self._answers is not None, "begun"
        usage = await self._answers.usage()
        is_cut = self._output.finish_reason == "length"
        ended = self._object(
            "incomplete" if is_cut else "completed",
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if is_cut else None,
            output=self._output.items,
            usage=_usage(usage),
        )
        if self._place is not None:
            assert self._turn is not None, "what is kept has a turn"
            await self._place.keep(self._turn, ended, self._body, self._past)
        return ended

    def _fed(self, piece: ChoiceEvents) -> list[EventFields]:
        logprobs = told_logprobs(self._call.state.engine, piece.logprobs or ())
        return [self._numbered(told) for told in self._output.feed(piece.events, logprobs)]

    def _numbered(self, told: EventFields) -> EventFields:
        told = {**told, "sequence_number": self._num_told}
        self._num_told += 1
        return told

    def _object(self, status: Any, **told: Any) -> ResponseObject:
        body, settings = self._body, self._call.state.settings
        text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
        choice = body.tool_choice
        return ResponseObject(
            **{"output": [], **told},
            id=self._id,
            created_at=self._call.created,
            status=status,
            model=body.model,
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            store=self._place is not None,
            tools=[tool.model_dump() for tool in body.tools or ()],
            tool_choice=choice if isinstance(choice, str) else "auto" if choice is None else choice.model_dump(),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            text={"format": {"type": "text"}, **text},
            reasoning={
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None if body.reasoning is None else body.reasoning.summary,
            },
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            temperature=settings.default_temperature if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_logprobs=body.top_logprobs or 0,
            truncation=body.truncation or "disabled",
            metadata=body.metadata or {},
            prompt_cache_key=body.prompt_cache_key,
            safety_identifier=body.safety_identifier,
            user=body.user,
        )


def _usage(usage: UsageObject) -> ResponseUsage:
    details = InputTokensDetails(cached_tokens=usage.cached_prefix_tokens, cache_write_tokens=usage.computed_tokens)
    return ResponseUsage(
        **{name: getattr(usage, name) for name in UsageObject.model_fields},
        input_tokens_details=details,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
    )
