"""One HTTP request's engine requests: started, followed, and always given back.

A `GenerationCall` lives from before the body is validated until the response has been sent or the client is gone.
Whatever ends it, every engine request it started has then ended too, its pages are returned and its place is free:
`close` cancels what still runs and waits for it. Worker threads tokenize and submit: nobody's long text holds up
others' streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple, TypeVar

import anyio
from fastapi import Depends, Request

from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.results import Chunk, Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import ContextReleased, EngineClosed, KVCommError, RequestCancelled
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.errors import ApiError, translate
from kvcomm.server.followed import FollowedAnswer
from kvcomm.server.logs import Answered, RequestNotes, log_unexpected, notes_of
from kvcomm.server.schemas.segments import AnswerSegment, FollowedSegment, SegmentedRequest
from kvcomm.server.schemas.usage import RunningUsage
from kvcomm.server.segments.prepared import Follow, PreparedPrompt
from kvcomm.server.state import ServerState, state_of
from kvcomm.server.tenants import Tenant, namespace
from kvcomm.server.waiting import timed_out, while_connected

T = TypeVar("T")

PREFILL = "prefill"
"""Finish reason of a prompt that was only computed ahead, without an answer."""


@dataclass(frozen=True)
class GenerationJob:
    """One prompt and what to do with it; `turn`: where it begins with a context, which has an adapter of its own."""

    prompt: PreparedPrompt
    sampling: SamplingParams
    policy: ReusePolicy
    salt: str | None = None
    turn: Turn | None = None
    adapter: str | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens that its choices can grow to; the prompt counts once, it is shared, and a context not at all."""
        num_prompt_tokens = self.prompt.max_tokens if self.turn is None else self.turn.num_new
        return num_prompt_tokens + self.sampling.n * self.sampling.max_new_tokens


class _Running(NamedTuple):
    """A job in the engine; `submitted_ns` since the epoch."""

    job: GenerationJob
    space: str
    handle: RequestHandle
    submitted_ns: int

    @property
    def prompt(self) -> PreparedPrompt:
        """Its prompt, with the answers that it follows, as far as they have ended."""
        return self.job.prompt.filled()


class JobChunk(NamedTuple):
    """A chunk, and which of a call's jobs it belongs to."""

    job: int
    chunk: Chunk


@dataclass(eq=False)
class GenerationCall:
    """The server's side of one HTTP request that generates."""

    request: Request
    state: ServerState
    tenant: Tenant
    notes: RequestNotes
    deadline_s: float
    created: int = field(default_factory=lambda: int(time.time()))
    num_streamed: int = 0  # tokens of answers that `pieces` has given
    _running: list[_Running] = field(default_factory=list)
    _completions: list[Completion] | None = None
    _leaving: list[asyncio.Task[None]] = field(default_factory=list)
    _source: FollowedAnswer | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts of its jobs."""
        return sum(each.prompt.num_tokens for each in self._running)

    def take_turn(self, turn: Turn) -> Turn:
        """End a turn with this call."""
        self._stack.callback(turn.end)
        return turn

    def at_end(self, work: Callable[[], object]) -> None:
        """Do something when this call has ended, in whatever way."""
        self._stack.callback(work)

    def followed(self, body: SegmentedRequest) -> list[FollowedAnswer]:
        """The answers that a request's segments follow, in order.

        Raises:
            ApiError: 404 for one that is neither in progress nor has just ended, for this tenant and salt.
        """
        space = namespace(self.tenant.name, body.cache_salt)
        found = []
        for index, segment in enumerate(body.segments or ()):
            if isinstance(segment, FollowedSegment):
                field = "response_id" if isinstance(segment, AnswerSegment) else "context_id"
                name = getattr(segment, field)
                source = self.tenant.sources.find(name, space)
                if source is None:
                    message = f"there is no answer {name!r} in progress, nor has one just ended; send its text"
                    raise ApiError(404, "response_not_found", message, param=f"segments[{index}].{field}")
                found.append(source)
        return found

    def known_as(self, answer_id: str) -> None:
        """Let others follow its first answer under this id, too."""
        if self._source is not None:
            self.tenant.sources.add(answer_id, self._source)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Do some work, unless the client disconnects or the time is up; the engine's errors become answers.

        Raises:
            ApiError: whatever went wrong; everything has been given back then.
        """
        try:
            return await while_connected(self.request.receive, work, deadline_s=self.deadline_s)
        except ApiError:
            await self.close()
            raise
        except KVCommError as error:
            await self.close()
            raise self._translated(error) from error

    async def make(self, maker: Callable[[], T], *, more_bytes: int = 0) -> T:
        """A prompt, rendered and tokenized by a worker; `more_bytes`: of text that the body only refers to."""
        num_bytes = len(await self.request.body()) + more_bytes
        return await self.state.workers.run(self.tenant.name, num_bytes, maker)

    async def submit(self, job: GenerationJob) -> None:
        """Start a job once there is a place for it.

        Raises:
            ApiError: no place; see `AdmissionControl.place`.
            KVCommError: the engine refuses it.
        """
        await self._stack.enter_async_context(self.state.admission.place(self.tenant, job.max_tokens))
        self.tenant.require_there()
        space = self.state.tenants.open_namespace(self.tenant, job.salt)

        def start() -> None:
            submitted_ns = time.time_ns()
            if job.turn is not None:
                handle = job.turn.start(job.sampling, job.policy)
            elif job.prompt.follows:
                handle = self._follow(job, space)
            else:
                handle = self.state.engine.submit(
                    job.prompt.segments, job.sampling, adapter=job.adapter, tenant=space, policy=job.policy
                )
            self._running.append(_Running(job, space, handle, submitted_ns))
            self.tenant.running.add(handle)

        await self.state.workers.engine.enter(self.tenant.name)
        num_before = len(self._running)
        try:
            await self.state.workers.start(start)  # if the caller is cancelled meanwhile, `close` finds the handle
        finally:
            if len(self._running) > num_before:
                self._make_known(self._running[-1])
                self._leaving.append(asyncio.ensure_future(self._leave_after(self._running[-1].handle)))
            else:
                self.state.workers.engine.leave(self.tenant.name)
        self.tenant.require_there()

    async def pieces(self) -> AsyncGenerator[JobChunk, None]:
        """Chunks of all jobs as they come.

        Raises:
            ApiError: what ended a job; 504 when the time is up.
        """
        async with aclosing(_merged([each.handle for each in self._running])) as pieces:
            while True:
                try:
                    async with asyncio.timeout_at(self.deadline_s):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise timed_out() from None
                except Exception as error:  # a job ends with whatever the model raised
                    raise self._translated(error) from error
                self.num_streamed += len(piece.chunk.token_ids)
                yield piece

    def usage_so_far(self) -> RunningUsage:
        """Usage of all jobs, while their answers are streamed."""
        num_prompt = self.num_prompt_tokens
        return RunningUsage(
            prompt_tokens=num_prompt,
            completion_tokens=self.num_streamed,
            total_tokens=num_prompt + self.num_streamed,
        )

    async def results(self) -> list[Completion]:
        """The completions in the order of submission, once all jobs have ended; the same when it is asked again.

        Raises:
            ApiError: what ended a job instead.
        """
        if self._completions is not None:
            return self._completions
        try:
            completions = [await each.handle.aresult() for each in self._running]
        except Exception as error:  # a job ends with whatever the model raised
            raise self._translated(error) from error
        for running in self._running:
            job = running.job
            if job.turn is not None:
                job.turn.keep()
            if job.prompt.lifetimes:
                prolong = partial(self.state.prolong, running.space, running.prompt, job.adapter)
                await self.state.workers.start(prolong)
        for index, (each, completion) in enumerate(zip(self._running, completions, strict=True)):
            for choice in completion.choices:
                reason = choice.finish_reason if each.job.sampling.max_new_tokens else PREFILL
                self.notes.finish_reasons.setdefault((index, choice.index), reason)
            self.state.metrics.completed(completion, each.job.policy)
            self.tenant.tally.add(completion.usage)
            self.notes.answered.append(Answered(each.submitted_ns, completion.usage))
        if self.state.settings.log_prompts:
            await self.state.workers.start(partial(self._note_texts, completions))
        self._completions = completions
        return completions

    def ends_as(self, finish_reason: str, *, job: int = 0, choice: int = 0) -> None:
        """Say what a client is told about the end of an answer, where that is not the engine's own reason."""
        self.notes.finish_reasons[job, choice] = finish_reason

    async def close(self) -> None:
        """Cancel what still runs, wait until it has ended, and give the places back. Idempotent."""
        for each in self._running:
            each.handle.cancel()
        with anyio.CancelScope(shield=True):
            for each in self._running:
                with suppress(Exception):  # how it ended has been told, or nobody is left to be told
                    await each.handle.aresult()
                self.tenant.running.discard(each.handle)
            await asyncio.gather(*self._leaving)
            if self._source is not None:
                self.tenant.sources.ended(self._source)
            self.state.tenants.keep_quota(self.tenant)
            await self._stack.aclose()

    def _follow(self, job: GenerationJob, space: str) -> RequestHandle:
        """Open the job's prompt, let it follow what it names, and ask for its answer; for a worker thread."""
        timeout_s = self.state.settings.follow_timeout_s
        opened = self.state.engine.open_prompt(
            adapter=job.adapter, tenant=space, policy=job.policy, deadline_s=timeout_s
        )
        with opened:
            for part in job.prompt.parts():
                if not isinstance(part, Follow):
                    opened.append(part)
                elif (handle := part.source.handle) is not None:
                    opened.follow(handle, name=part.name, keep=part.source.keep)
                else:  # it has ended since
                    opened.append([Segment(part.source.required_ids(), part.name)])
            return opened.close(job.sampling)

    def _make_known(self, running: _Running) -> None:
        """Let others follow the answer of its first job."""
        if self._source is None:
            job = running.job
            self._source = FollowedAnswer(
                running.space, job.sampling.max_new_tokens, self.state.prompts.plain_ids, running.handle
            )
            self.known_as(self.notes.request_id)
            extended = None if job.turn is None else job.turn.extended_id
            if extended is not None:
                self.known_as(extended)

    async def _leave_after(self, handle: RequestHandle) -> None:
        """Let the next request into the engine once one has ended."""
        with suppress(Exception):  # whoever asked for it is told
            await handle.aresult()
        self.state.workers.engine.leave(self.tenant.name)

    def _note_texts(self, completions: Sequence[Completion]) -> None:
        decode = self.state.engine.texts.decode
        self.notes.fields["prompts"] = [decode(each.prompt.token_ids) for each in self._running]
        self.notes.fields["answers"] = [[choice.text for choice in each.choices] for each in completions]

    def _translated(self, error: BaseException) -> ApiError:
        if isinstance(error, EngineClosed):
            self.state.is_engine_closed = True
        if self.tenant.is_gone and isinstance(error, RequestCancelled | ContextReleased):
            return self.tenant.removed()
        answer = translate(
            error,
            retry_after_s=self.state.settings.retry_after_s,
            context_tokens=self.tenant.context_tokens,
        )
        if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
            log_unexpected(error, self.notes)
        return answer


async def _begin(request: Request) -> AsyncIterator[GenerationCall]:
    state = state_of(request)
    notes = notes_of(request.scope)
    deadline_s = asyncio.get_running_loop().time() + state.settings.request_timeout_s
    call = GenerationCall(request, state, state.tenant_of(request), notes, deadline_s)
    try:
        yield call
    finally:
        await call.close()


CallDep = Annotated[GenerationCall, Depends(_begin)]
"""A call that is closed once the response has been sent."""


async def _merged(handles: Sequence[RequestHandle]) -> AsyncGenerator[JobChunk, None]:
    """Chunks of several handles; leaving early cancels them all."""
    queue: asyncio.Queue[JobChunk | Exception | None] = asyncio.Queue()

    async def follow(job: int, handle: RequestHandle) -> None:
        try:
            async for chunk in handle:
                queue.put_nowait(JobChunk(job, chunk))
        except Exception as error:  # raised where the queue is read
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(follow(job, handle)) for job, handle in enumerate(handles)]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
