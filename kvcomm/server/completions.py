"""`POST /v1/completions`: one or more prompts as they are, each with its choices."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from fastapi import APIRouter, Depends
from starlette.responses import Response

from kvcomm.engine.grammar import Grammar
from kvcomm.engine.results import Choice, Completion
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.chat import reason
from kvcomm.server.completion_logprobs import Echo, LogprobEntry, echo_of, entries_of, lists_of, prompt_lists
from kvcomm.server.contexts.answering import begin_turn, put_text
from kvcomm.server.errors import COMPUTING_TEXTS
from kvcomm.server.generation import CallDep, GenerationCall, GenerationJob, JobChunk
from kvcomm.server.sampling import policy_of, sampling_of
from kvcomm.server.schemas.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, TextCompletion
from kvcomm.server.schemas.usage import UsageObject
from kvcomm.server.streaming import DOCUMENTED, EventStream
from kvcomm.server.structured import compile_grammar, field_of, grammar_of
from kvcomm.server.tenants import namespace
from kvcomm.server.usage import usage_of

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post(
    "/v1/completions",
    operation_id="createCompletion",
    response_model=TextCompletion,
    responses={**DOCUMENTED, **COMPUTING_TEXTS},
    dependencies=[Depends(security)],
)
async def create_completion(body: CompletionRequest, call: CallDep) -> Response | TextCompletion:
    """Continue texts or token ids. Choice i of prompt p has the index p * n + i."""
    return await call.guard(_answer(body, call))


async def _answer(body: CompletionRequest, call: GenerationCall) -> Response | TextCompletion:
    call.state.adapter_of(body.model)
    call.state.admission.require_places(call.tenant, len(body.prompts))
    jobs: list[GenerationJob] = []
    for prompt in body.prompts:
        jobs.append(await _job(prompt, body, call))
        await call.submit(jobs[-1])
    answer = _Answer(body, call, jobs)
    call.known_as(answer.id)
    if not body.stream:
        return await answer.whole()
    pieces = call.pieces()
    # Errors before the first token still have a status of their own.
    first = await anext(pieces, None)
    return EventStream(answer.events(first, pieces), deadline_s=call.deadline_s)


async def _job(prompt: str | list[int], body: CompletionRequest, call: GenerationCall) -> GenerationJob:
    state = call.state
    adapter = state.adapter_of(body.model)
    turn = begin_turn(body, adapter, call)
    if turn is None:
        prepared = await call.make(
            partial(state.prompts.completion, prompt, body, call.tenant.name, call.followed(body)),
            more_bytes=state.registries.num_bytes(call.tenant.name, body.segments or ()),
        )
    else:
        prepared = await call.make(partial(put_text, turn, prompt, body, state.prompts))
    sampling = sampling_of(
        body,
        state.settings,
        num_prompt_tokens=prepared.max_tokens,
        max_context=state.engine.max_context,
        wanted_tokens=body.wanted_tokens,
        # An echo needs to know the first token: its text may lack the space that it has behind a prompt.
        logprobs=0 if body.logprobs is None and body.echo else body.logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
    )
    salt = body.cache_salt if turn is None else turn.salt
    grammar = await call.make(partial(_compiled, body, call, salt))
    if grammar is not None:
        sampling = replace(sampling, grammar=grammar)
    return GenerationJob(prepared, sampling, policy_of(body, state.settings), salt, turn, adapter)


def _compiled(body: CompletionRequest, call: GenerationCall, salt: str | None) -> Grammar | None:
    """The grammar of the answers, known to the engine; for a worker thread."""
    grammar = grammar_of(body)
    if grammar is not None:
        space = namespace(call.tenant.name, salt)
        compile_grammar(call.state.engine, grammar, space=space, param=field_of(body))
    return grammar


@dataclass
class _Choice:
    """What has been sent of a streamed choice: with echo its first tokens, and whether its text and its end are out."""

    first_ids: list[int] = field(default_factory=list)
    has_text: bool = False
    has_ended: bool = False


class _Answer:
    """Builds what is sent from what the engine gives, under one `id`."""

    def __init__(self, body: CompletionRequest, call: GenerationCall, jobs: Sequence[GenerationJob]) -> None:
        self._body = body
        self._call = call
        self._jobs = jobs
        self._engine = call.state.engine
        self._names = call.state.token_names
        self._num_choices = body.n or 1
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._sent: dict[int, _Choice] = defaultdict(_Choice)  # by index of the choice

    async def whole(self) -> TextCompletion:
        """The answer in one piece."""
        completions = await self._call.results()
        usage = usage_of([completion.usage for completion in completions])
        return self._completion(await self._made(completions), usage)

    async def events(
        self, first: JobChunk | None, rest: AsyncGenerator[JobChunk, None]
    ) -> AsyncGenerator[TextCompletion, None]:
        """The answer as a stream: prompts that are echoed, texts as they come, ends.

        Log-probabilities of prompts are there when their answers are, so with those the answers come in one piece.
        """
        is_told_at_once = self._body.echo and self._body.logprobs is not None
        if self._body.echo and not is_told_at_once:
            for choice in self._echoes():
                yield self._completion([choice])
        if first is not None and not is_told_at_once:
            for choice in self._pieces(first):
                yield self._completion([choice])
        async with aclosing(rest):
            async for piece in rest:
                for choice in () if is_told_at_once else self._pieces(piece):
                    yield self._completion([choice])
        completions = await self._call.results()
        if is_told_at_once:
            for choice in await self._made(completions):
                yield self._completion([choice])
        else:
            for choice in self._ends(completions):
                yield self._completion([choice])
        if self._body.wants_usage_chunk:
            yield self._completion([], usage_of([completion.usage for completion in completions]))

    async def _made(self, completions: Sequence[Completion]) -> list[CompletionChoice]:
        """All choices; by a worker, where tokens of prompts have to be looked at."""
        make = partial(self._whole_choices, completions)
        return make() if self._body.num_prompt_logprobs is None else await self._call.make(make)

    def _whole_choices(self, completions: Sequence[Completion]) -> list[CompletionChoice]:
        return [
            choice
            for job, (prompt, completion) in enumerate(zip(self._body.prompts, completions, strict=True))
            for choice in self._choices_of(job, prompt, completion)
        ]

    def _choices_of(self, job: int, prompt: str | list[int], completion: Completion) -> list[CompletionChoice]:
        echo = self._echo(job, prompt, completion)
        told = None
        if self._body.prompt_logprobs is not None and completion.prompt_logprobs is not None:
            told = prompt_lists(self._names, completion.prompt_logprobs, self._body.prompt_logprobs)
        return [
            CompletionChoice(
                index=self._index(job, choice.index),
                text=(text := echo.text + self._shown(choice)),
                logprobs=self._logprobs([*echo.entries, *self._placed(choice, len(echo.text), len(text))]),
                finish_reason=reason(choice.finish_reason),
                prompt_logprobs=told,
            )
            for choice in completion.choices
        ]

    def _echo(self, job: int, prompt: str | list[int], completion: Completion) -> Echo:
        if not self._body.echo:
            return Echo("")
        if self._body.logprobs is None:
            return Echo(self._prompt_text(prompt))
        return echo_of(self._engine, prompt, self._jobs[job].prompt.token_ids, completion)

    def _echoes(self) -> Iterator[CompletionChoice]:
        """Prompts as the beginnings of their streamed choices."""
        for job, prompt in enumerate(self._body.prompts):
            text = self._prompt_text(prompt)
            for choice in range(self._num_choices):
                index = self._index(job, choice)
                yield CompletionChoice(index=index, text=text, logprobs=None, finish_reason=None)

    def _prompt_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._engine.texts.decode(prompt)

    def _pieces(self, piece: JobChunk) -> list[CompletionChoice]:
        """One event for a chunk; none while its text is held back."""
        chunk, index = piece.chunk, self._index(piece.job, piece.chunk.choice)
        sent, text = self._sent[index], chunk.text
        if self._body.echo and not sent.has_text:
            sent.first_ids += [token.token_id for token in chunk.logprobs or ()]
            text = self._lost_space(sent.first_ids) + text if text else ""
            sent.has_text = bool(text)
        logprobs = self._logprobs(entries_of(chunk)) if chunk.logprobs else None
        if not (text or logprobs or chunk.finish_reason):
            return []
        end = None if chunk.finish_reason is None else reason(chunk.finish_reason)
        sent.has_ended = end is not None
        return [CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=end)]

    def _ends(self, completions: Sequence[Completion]) -> Iterator[CompletionChoice]:
        """Ends of choices of which nothing was to be generated."""
        for job, completion in enumerate(completions):
            for choice in completion.choices:
                index = self._index(job, choice.index)
                if not self._sent[index].has_ended:
                    end = reason(choice.finish_reason)
                    yield CompletionChoice(index=index, text="", logprobs=None, finish_reason=end)

    def _shown(self, choice: Choice) -> str:
        space = self._lost_space(token.token_id for token in choice.logprobs or ()) if choice.text else ""
        return space + choice.text

    def _lost_space(self, token_ids: Iterable[int]) -> str:
        """What stands between a prompt that is echoed and its answer; see `Engine.lost_space`."""
        skips = self._body.skip_special_tokens is not False
        return self._engine.texts.lost_space(token_ids, skip_special_tokens=skips) if self._body.echo else ""

    def _placed(self, choice: Choice, start: int, end: int) -> list[LogprobEntry]:
        """The tokens of an answer behind an echoed prompt that ends at `start`; with the token that ended it at `end`.

        Whoever scores a prompt with an answer of one token leaves out the last entry, whatever was drawn.
        """
        entries = entries_of(choice)
        if not self._body.echo:
            return entries
        behind = end - len(choice.text)
        spaced = (at for at, each in enumerate(entries) if self._names.text(each.token_id).startswith(" "))
        first = next(spaced, -1) if behind > start else -1  # the token with the space that was lost
        entries = [
            each._replace(place=each.place + (start if at <= first else behind)) for at, each in enumerate(entries)
        ]
        if choice.end_logprob is not None:
            entries.append(LogprobEntry(choice.end_logprob.token_id, choice.end_logprob, end))
        return entries

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> CompletionLogprobs | None:
        return None if self._body.logprobs is None else lists_of(self._names, entries, self._body.logprobs)

    def _index(self, job: int, choice: int) -> int:
        return job * self._num_choices + choice

    def _completion(self, choices: list[CompletionChoice], usage: UsageObject | None = None) -> TextCompletion:
        completion = TextCompletion(
            id=self.id,
            object="text_completion",
            created=self._call.created,
            model=self._body.model,
            system_fingerprint=self._call.state.fingerprint,
            choices=choices,
        )
        if usage is None and self._body.wants_running_usage:
            return completion.model_copy(update={"usage": self._call.usage_so_far()})
        has_usage = usage is not None or self._body.wants_usage_chunk
        return completion.model_copy(update={"usage": usage}) if has_usage else completion
