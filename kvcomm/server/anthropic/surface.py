"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from kvcomm.server.access import key_header, security
from kvcomm.server.answers import ChatAnswers, ChoiceEvents
from kvcomm.server.anthropic.output import STOP_REASONS, Blocks, EventFields
from kvcomm.server.anthropic.translation import NAMES, breakpoints_of, chat_request, longest_ttl
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.errors import COMPUTING, messages_error
from kvcomm.server.generation import CallDep, GenerationCall
from kvcomm.server.schemas.anthropic import MessagesPrompt, MessagesRequest
from kvcomm.server.schemas.anthropic_answers import (
    CacheCreation,
    MessageAnswer,
    MessagesErrorResponse,
    MessagesUsage,
    StopReason,
    TokenCount,
)
from kvcomm.server.schemas.common import seconds
from kvcomm.server.schemas.usage import UsageObject
from kvcomm.server.streaming import EventStream, Wire, documented_stream, named_event
from kvcomm.server.translation import told_as

router = APIRouter(
    prefix="/v1/messages",
    tags=["Anthropic"],
    dependencies=[Depends(security), Depends(key_header)],
    route_class=BodyRoute,
)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": MessagesErrorResponse} for status, told in COMPUTING.items()
}
SHORT_TTL_S = 300
"""Lifetimes up to this one are told as Anthropic's shorter one."""


@router.post(
    "",
    operation_id="createMessage",
    response_model=MessageAnswer,
    responses={
        **documented_stream("The answer; with `stream`, server-sent events that are named by their type."),
        **ERRORS,
    },
)
async def create_message(body: MessagesRequest, call: CallDep) -> Response | MessageAnswer:
    """Continue a conversation. What it shares with earlier prompts of the same tenant is not computed again."""
    with told_as(NAMES):
        return await call.guard(_answer(body, call))


@router.post("/count_tokens", operation_id="countMessageTokens", responses=ERRORS)
async def count_tokens(body: MessagesPrompt, call: CallDep) -> TokenCount:
    """Tokens of a prompt, which is not computed."""
    with told_as(NAMES):
        return await call.guard(_count(body, call))


async def _answer(body: MessagesRequest, call: GenerationCall) -> Response | MessageAnswer:
    chat = await call.make(partial(chat_request, body))
    answers = await ChatAnswers.begin(chat, call)
    message = _Message(body, call, answers)
    if not body.stream:
        return await message.whole()
    pieces = answers.events()
    # Errors before the first token still have a status of their own.
    first = await anext(pieces, None)
    failure = partial(messages_error, request_id=call.notes.request_id)
    return EventStream(message.events(first, pieces), deadline_s=call.deadline_s, wire=Wire(named_event, failure))


async def _count(body: MessagesPrompt, call: GenerationCall) -> TokenCount:
    call.state.adapter_of(body.model)

    def count() -> int:
        return call.state.prompts.chat(chat_request(body), call.tenant.name).num_tokens

    return TokenCount(input_tokens=await call.make(count))


class _Message:
    """One answer, told whole or as a stream."""

    def __init__(self, body: MessagesRequest, call: GenerationCall, answers: ChatAnswers) -> None:
        self._body = body
        self._call = call
        self._answers = answers
        self._blocks = Blocks()
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        call.known_as(self._id)

    async def whole(self) -> MessageAnswer:
        """The answer, once it is complete."""
        async with aclosing(self._answers.events()) as pieces:
            async for piece in pieces:
                list(self._blocks.feed(piece.events))
        reason, sequence = await self._stop()
        return MessageAnswer(
            id=self._id,
            model=self._body.model,
            content=self._blocks.done,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(await self._answers.usage()),
        )

    async def events(
        self, first: ChoiceEvents | None, rest: AsyncGenerator[ChoiceEvents, None]
    ) -> AsyncGenerator[EventFields, None]:
        """The events of its stream."""
        yield {"type": "message_start", "message": self._begun().model_dump()}
        async with aclosing(rest):
            if first is not None:
                for told in self._blocks.feed(first.events):
                    yield told
            async for piece in rest:
                for told in self._blocks.feed(piece.events):
                    yield told
        reason, sequence = await self._stop()
        usage = self._usage(await self._answers.usage())
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield {"type": "message_delta", "delta": delta, "usage": usage.model_dump()}
        yield {"type": "message_stop"}

    def _begun(self) -> MessageAnswer:
        """The message before its first block; where its prompt's tokens come from is known at its end."""
        usage = MessagesUsage(
            input_tokens=self._call.num_prompt_tokens,
            cache_read_input_tokens=0,
            cache_creation_input_tokens=0,
            cache_creation=CacheCreation(ephemeral_5m_input_tokens=0, ephemeral_1h_input_tokens=0),
            output_tokens=0,
        )
        return MessageAnswer(
            id=self._id, model=self._body.model, content=[], stop_reason=None, stop_sequence=None, usage=usage
        )

    async def _stop(self) -> tuple[StopReason, str | None]:
        """Why it ended, and the sequence that ended it."""
        (completion,) = await self._call.results()
        stopped_by = completion.choices[0].stopped_by
        reason = STOP_REASONS[self._blocks.finish_reason or completion.finish_reason]
        if reason == "end_turn" and stopped_by is not None:
            return "stop_sequence", stopped_by
        return reason, None

    def _usage(self, usage: UsageObject) -> MessagesUsage:
        num_created = usage.computed_tokens if breakpoints_of(self._body) else 0
        ttl = longest_ttl(self._body)
        is_short = ttl is None or seconds(ttl) <= SHORT_TTL_S
        return MessagesUsage(
            input_tokens=usage.prompt_tokens - usage.cached_prefix_tokens - num_created,
            cache_read_input_tokens=usage.cached_prefix_tokens,
            cache_creation_input_tokens=num_created,
            cache_creation=CacheCreation(
                ephemeral_5m_input_tokens=num_created if is_short else 0,
                ephemeral_1h_input_tokens=0 if is_short else num_created,
            ),
            output_tokens=usage.completion_tokens,
            miss_reasons=usage.miss_reasons,
            bound=usage.bound,
            timings=usage.timings,
        )
