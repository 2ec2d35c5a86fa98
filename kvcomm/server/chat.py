"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Depends
from starlette.responses import Response

from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.access import security
from kvcomm.server.answers import ChatAnswers, ChoiceAnswer, ChoiceEvents
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.completion_logprobs import prompt_lists
from kvcomm.server.errors import COMPUTING_TEXTS
from kvcomm.server.generation import CallDep, GenerationCall
from kvcomm.server.logprobs import told_logprobs
from kvcomm.server.schemas.chat import (
    AnsweredCall,
    AnsweredFunction,
    AnswerMessage,
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionDelta,
)
from kvcomm.server.schemas.logprobs import PromptLogprob
from kvcomm.server.schemas.usage import UsageObject
from kvcomm.server.state import ServerState
from kvcomm.server.streaming import DOCUMENTED, EventStream
from kvcomm.toolcalls.events import Answer, ArgumentsDelta, CallEnd, CallStart, Finish, ReasoningDelta, TextDelta

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post(
    "/v1/chat/completions",
    operation_id="createChatCompletion",
    response_model=ChatCompletion,
    responses={**DOCUMENTED, **COMPUTING_TEXTS},
    dependencies=[Depends(security)],
)
async def create_chat_completion(body: ChatRequest, call: CallDep) -> Response | ChatCompletion:
    """Continue a conversation. What it shares with earlier prompts of the same tenant is not computed again."""
    return await call.guard(_answer(body, call))


async def _answer(body: ChatRequest, call: GenerationCall) -> Response | ChatCompletion:
    answers = await ChatAnswers.begin(body, call)
    wire = _Wire(body, call)
    if not body.stream:
        make = partial(wire.whole, await answers.whole(), await answers.usage(), await answers.prompt_logprobs())
        return make() if body.prompt_logprobs is None else await call.make(make)
    events = answers.events()
    # Errors before the first token still have a status of their own.
    first = await anext(events, None)
    return EventStream(wire.chunks(first, events, answers), deadline_s=call.deadline_s)


class _Wire:
    """Writes answers as OpenAI does."""

    def __init__(self, body: ChatRequest, call: GenerationCall) -> None:
        self._body = body
        self._call = call
        self._state: ServerState = call.state
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        call.known_as(self._id)

    def whole(
        self, answers: list[ChoiceAnswer], usage: UsageObject, prompt: tuple[TokenLogprob | None, ...] | None
    ) -> ChatCompletion:
        """The answer in one piece; `prompt`: log-probabilities of its tokens."""
        return ChatCompletion(
            id=self._id,
            created=self._call.created,
            model=self._body.model,
            system_fingerprint=self._state.fingerprint,
            choices=[self._choice(*each) for each in answers],
            usage=usage,
            prompt_logprobs=self._prompt_logprobs(prompt),
        )

    async def chunks(
        self, first: ChoiceEvents | None, rest: AsyncGenerator[ChoiceEvents, None], answers: ChatAnswers
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answer as a stream: roles, what comes, ends, and the usage if it was asked for."""
        for index in range(self._body.n or 1):
            yield self._chunk(_piece(index, Delta(role="assistant", content="")))
        if first is not None:
            for choice in self._pieces(first):
                yield self._chunk(choice)
        async with aclosing(rest):
            async for piece in rest:
                for choice in self._pieces(piece):
                    yield self._chunk(choice)
        usage = await answers.usage()
        if self._body.wants_usage_chunk:
            yield self._chunk(None, usage)

    def _choice(self, index: int, answer: Answer, logprobs: tuple[TokenLogprob, ...] | None) -> ChatChoice:
        calls = [
            AnsweredCall(id=call.id, function=AnsweredFunction(name=call.name, arguments=call.arguments))
            for call in answer.calls
        ]
        message = AnswerMessage(
            content=None if calls and not answer.text else answer.text,
            tool_calls=calls or None,
            reasoning_content=answer.reasoning or None,
            reasoning=answer.reasoning or None,
        )
        return ChatChoice(
            index=index,
            message=message,
            logprobs=None if logprobs is None else self._logprobs(logprobs),
            finish_reason=answer.finish_reason,
        )

    def _pieces(self, piece: ChoiceEvents) -> list[ChunkChoice]:
        """One chunk for each event; log-probabilities come with the first one, also where it has nothing else yet."""
        choices = []
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        for event in piece.events:
            if isinstance(event, Finish) and logprobs is not None:
                choices.append(_piece(piece.choice, Delta(content=""), logprobs=logprobs))
                logprobs = None
            if isinstance(event, Finish):
                choices.append(_piece(piece.choice, Delta(), finish_reason=event.reason))
            elif not isinstance(event, CallEnd):
                choices.append(_piece(piece.choice, _delta(event), logprobs=logprobs))
                logprobs = None
        if logprobs is not None:
            choices.append(_piece(piece.choice, Delta(content=""), logprobs=logprobs))
        return choices

    def _chunk(self, choice: ChunkChoice | None, usage: UsageObject | None = None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._call.created,
            model=self._body.model,
            system_fingerprint=self._state.fingerprint,
            choices=[] if choice is None else [choice],
        )
        if usage is None and self._body.wants_running_usage:
            return chunk.model_copy(update={"usage": self._call.usage_so_far()})
        return chunk.model_copy(update={"usage": usage}) if self._body.wants_usage_chunk else chunk

    def _prompt_logprobs(
        self, tokens: tuple[TokenLogprob | None, ...] | None
    ) -> list[dict[str, PromptLogprob] | None] | None:
        if self._body.prompt_logprobs is None or tokens is None:
            return None
        return prompt_lists(self._state.token_names, tokens, self._body.prompt_logprobs)

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> ChoiceLogprobs:
        return ChoiceLogprobs(content=told_logprobs(self._state.engine, tokens), refusal=None)


def _delta(event: TextDelta | ReasoningDelta | CallStart | ArgumentsDelta) -> Delta:
    match event:
        case TextDelta(text):
            return Delta(content=text)
        case ReasoningDelta(text):
            return Delta(reasoning_content=text, reasoning=text)
        case CallStart(index, call_id, name):
            function = FunctionDelta(name=name, arguments="")
            return Delta(tool_calls=[CallDelta(index=index, id=call_id, type="function", function=function)])
        case ArgumentsDelta(index, text):
            return Delta(tool_calls=[CallDelta(index=index, function=FunctionDelta(arguments=text))])


def _piece(
    index: int, delta: Delta, *, logprobs: ChoiceLogprobs | None = None, finish_reason: FinishReason | None = None
) -> ChunkChoice:
    """With everything set: what a model's fields leave unset is not sent."""
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def reason(finish_reason: str) -> FinishReason:
    """OpenAI's name for why the engine ended a text without calls."""
    return "stop" if finish_reason == "stop" else "length"
