"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Depends
from starlette.responses import Response

from kvcomm.engine.results import Choice, Chunk, Completion
from kvcomm.engine.sampling import TokenLogprob as EngineLogprob
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.completion_logprobs import prompt_lists
from kvcomm.server.contexts.answering import begin_turn, put_messages
from kvcomm.server.errors import documented
from kvcomm.server.generation import Call, CallDep, Job, Piece
from kvcomm.server.sampling import num_breakpoints, policy_of, sampling_of
from kvcomm.server.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    TokenLogprob,
    TopLogprob,
)
from kvcomm.server.schemas.logprobs import PromptLogprob
from kvcomm.server.schemas.usage import Usage
from kvcomm.server.state import ServerState
from kvcomm.server.streaming import DOCUMENTED, EventStream
from kvcomm.server.usage import plan_of, usage_of

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post(
    "/v1/chat/completions",
    operation_id="createChatCompletion",
    response_model=ChatCompletion,
    responses={**DOCUMENTED, **documented(400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503, 504)},
    dependencies=[Depends(security)],
)
async def create_chat_completion(body: ChatRequest, call: CallDep) -> Response | ChatCompletion:
    """Continue a conversation. What it shares with earlier prompts of the same tenant is not computed again."""
    return await call.guard(_answer(body, call))


async def _answer(body: ChatRequest, call: Call) -> Response | ChatCompletion:
    await call.submit(await _job(body, call))
    answer = _Answer(body, call)
    if not body.stream:
        return answer.whole((await call.results())[0])
    pieces = call.pieces()
    # Errors before the first token still have a status of their own.
    first = await anext(pieces, None)
    return EventStream(answer.events(first, pieces), deadline_s=call.deadline_s)


async def _job(body: ChatRequest, call: Call) -> Job:
    state = call.state
    adapter = state.adapter_of(body.model)
    turn = begin_turn(body, adapter, call)
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
        prompt_logprobs=body.prompt_logprobs,
    )
    salt = body.cache_salt if turn is None else turn.salt
    return Job(prompt, sampling, policy_of(body, state.settings), salt, turn, adapter)


class _Answer:
    """Builds what is sent from what the engine gives."""

    def __init__(self, body: ChatRequest, call: Call) -> None:
        self._body = body
        self._call = call
        self._state: ServerState = call.state
        self._id = f"chatcmpl-{uuid.uuid4().hex}"

    def whole(self, completion: Completion) -> ChatCompletion:
        """The answer in one piece."""
        return ChatCompletion(
            id=self._id,
            created=self._call.created,
            model=self._body.model,
            system_fingerprint=self._state.fingerprint,
            choices=[self._choice(choice) for choice in completion.choices],
            usage=self._usage(completion),
            prompt_logprobs=self._prompt_logprobs(completion),
        )

    async def events(
        self, first: Piece | None, rest: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answer as a stream: roles, texts, ends, and the usage if it was asked for."""
        for index in range(self._body.n or 1):
            yield self._chunk(_piece(index, Delta(role="assistant", content="")))
        if first is not None:
            for choice in self._pieces(first.chunk):
                yield self._chunk(choice)
        async with aclosing(rest):
            async for piece in rest:
                for choice in self._pieces(piece.chunk):
                    yield self._chunk(choice)
        (completion,) = await self._call.results()
        if self._body.wants_usage_chunk:
            yield self._chunk(None, self._usage(completion))

    def _choice(self, choice: Choice) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=AnswerMessage(content=choice.text),
            logprobs=None if choice.logprobs is None else self._logprobs(choice.logprobs),
            finish_reason=reason(choice.finish_reason),
        )

    def _pieces(self, chunk: Chunk) -> list[ChunkChoice]:
        """A chunk's text, then its end, as clients expect them; nothing while text is held back."""
        choices = []
        if chunk.text or chunk.logprobs:
            logprobs = self._logprobs(chunk.logprobs) if chunk.logprobs else None
            choices.append(_piece(chunk.choice, Delta(content=chunk.text), logprobs=logprobs))
        if chunk.finish_reason is not None:
            choices.append(_piece(chunk.choice, Delta(), finish_reason=reason(chunk.finish_reason)))
        return choices

    def _chunk(self, choice: ChunkChoice | None, usage: Usage | None = None) -> ChatCompletionChunk:
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

    def _usage(self, completion: Completion) -> Usage:
        usage = usage_of([completion.usage], cache_breakpoints=num_breakpoints(self._body))
        return usage.model_copy(update={"plan": plan_of(completion.usage.spans)}) if self._body.include_plan else usage

    def _prompt_logprobs(self, completion: Completion) -> list[dict[str, PromptLogprob] | None] | None:
        if self._body.prompt_logprobs is None or completion.prompt_logprobs is None:
            return None
        return prompt_lists(self._state.token_names, completion.prompt_logprobs, self._body.prompt_logprobs)

    def _logprobs(self, tokens: tuple[EngineLogprob, ...]) -> ChoiceLogprobs:
        return ChoiceLogprobs(content=[self._logprob(token) for token in tokens], refusal=None)

    def _logprob(self, token: EngineLogprob) -> TokenLogprob:
        top = [self._top(token_id, logprob) for token_id, logprob in token.top]
        drawn = self._top(token.token_id, token.logprob)
        return TokenLogprob(token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        engine = self._state.engine
        return TopLogprob(token=engine.token_text(token_id), logprob=logprob, bytes=list(engine.token_bytes(token_id)))


def _piece(
    index: int, delta: Delta, *, logprobs: ChoiceLogprobs | None = None, finish_reason: FinishReason | None = None
) -> ChunkChoice:
    """With everything set: what a model's fields leave unset is not sent."""
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def reason(finish_reason: str) -> FinishReason:
    """The engine's reason is OpenAI's; two are possible."""
    return "stop" if finish_reason == "stop" else "length"
