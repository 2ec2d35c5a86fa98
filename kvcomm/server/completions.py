"""`POST /v1/completions`: one or more prompts as they are, each with its choices."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import accumulate

from fastapi import APIRouter, Depends
from starlette.responses import Response

from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.chat import reason
from kvcomm.server.contexts.answering import begin_turn, put_text
from kvcomm.server.errors import documented
from kvcomm.server.generation import Call, CallDep, Job, Piece
from kvcomm.server.sampling import policy_of, sampling_of
from kvcomm.server.schemas.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, TextCompletion
from kvcomm.server.schemas.usage import Usage
from kvcomm.server.streaming import DOCUMENTED, EventStream
from kvcomm.server.usage import usage_of

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post(
    "/v1/completions",
    operation_id="createCompletion",
    response_model=TextCompletion,
    responses={**DOCUMENTED, **documented(400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503, 504)},
    dependencies=[Depends(security)],
)
async def create_completion(body: CompletionRequest, call: CallDep) -> Response | TextCompletion:
    """Continue texts or token ids. Choice i of prompt p has the index p * n + i."""
    return await call.guard(_answer(body, call))


async def _answer(body: CompletionRequest, call: Call) -> Response | TextCompletion:
    call.state.adapter_of(body.model)
    call.state.admission.require_places(call.tenant, len(body.prompts))
    for prompt in body.prompts:
        await call.submit(await _job(prompt, body, call))
    answer = _Answer(body, call)
    if not body.stream:
        return answer.whole(await call.results())
    pieces = call.pieces()
    # Errors before the first token still have a status of their own.
    first = await anext(pieces, None)
    return EventStream(answer.events(first, pieces), deadline_s=call.deadline_s)


async def _job(prompt: str | list[int], body: CompletionRequest, call: Call) -> Job:
    state = call.state
    adapter = state.adapter_of(body.model)
    turn = begin_turn(body, adapter, call)
    if turn is None:
        prepared = await call.make(
            partial(state.prompts.completion, prompt, body, call.tenant.name),
            more_bytes=state.registries.num_bytes(call.tenant.name, body.segments or ()),
        )
    else:
        prepared = await call.make(partial(put_text, turn, prompt, body, state.prompts))
    sampling = sampling_of(
        body,
        state.settings,
        num_prompt_tokens=prepared.num_tokens,
        max_context=state.engine.max_context,
        wanted_tokens=body.max_tokens,
        logprobs=body.logprobs,
    )
    salt = body.cache_salt if turn is None else turn.salt
    return Job(prepared, sampling, policy_of(body, state.settings), salt, turn, adapter)


class _Answer:
    """Builds what is sent from what the engine gives."""

    def __init__(self, body: CompletionRequest, call: Call) -> None:
        self._body = body
        self._call = call
        self._num_choices = body.n or 1
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}  # characters streamed so far, by index of the choice

    def whole(self, completions: Sequence[Completion]) -> TextCompletion:
        """The answer in one piece."""
        choices = [
            CompletionChoice(
                index=self._index(job, choice.index),
                text=choice.text,
                logprobs=None if choice.logprobs is None else self._logprobs(choice.logprobs, 0),
                finish_reason=reason(choice.finish_reason),
            )
            for job, completion in enumerate(completions)
            for choice in completion.choices
        ]
        return self._completion(choices, usage_of([completion.usage for completion in completions]))

    async def events(
        self, first: Piece | None, rest: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[TextCompletion, None]:
        """The answer as a stream."""
        if first is not None:
            for choice in self._pieces(first):
                yield self._completion([choice])
        async with aclosing(rest):
            async for piece in rest:
                for choice in self._pieces(piece):
                    yield self._completion([choice])
        completions = await self._call.results()
        if self._body.wants_usage_chunk:
            yield self._completion([], usage_of([completion.usage for completion in completions]))

    def _pieces(self, piece: Piece) -> list[CompletionChoice]:
        """One event for a chunk; none while its text is held back."""
        chunk, index = piece.chunk, self._index(piece.job, piece.chunk.choice)
        if not (chunk.text or chunk.logprobs or chunk.finish_reason):
            return []
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(chunk.text)
        logprobs = self._logprobs(chunk.logprobs, offset) if chunk.logprobs else None
        end = None if chunk.finish_reason is None else reason(chunk.finish_reason)
        return [CompletionChoice(index=index, text=chunk.text, logprobs=logprobs, finish_reason=end)]

    def _index(self, job: int, choice: int) -> int:
        return job * self._num_choices + choice

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> TextCompletion:
        completion = TextCompletion(
            id=self._id,
            object="text_completion",
            created=self._call.created,
            model=self._body.model,
            system_fingerprint=self._call.state.fingerprint,
            choices=choices,
        )
        has_usage = usage is not None or self._body.wants_usage_chunk
        return completion.model_copy(update={"usage": usage}) if has_usage else completion

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
        text_of = self._call.state.engine.token_text
        texts = [text_of(token.token_id) for token in tokens]
        top = None
        if self._body.logprobs:
            top = [{text_of(token_id): logprob for token_id, logprob in token.top} for token in tokens]
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=top,
            text_offset=list(accumulate((len(text) for text in texts[:-1]), initial=offset)) if texts else [],
        )
