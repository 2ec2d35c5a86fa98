"""Open prompts: prompts that are not complete yet, of which what is known is computed while others decode.

An agent's role and question need not wait for the answers that it will read, and an answer can be read while it is
written: its tokens go into its readers' prompts, a few at a time. When it ends, a reader has a few tokens left to
compute: the first token of an exact prefix hit, and nothing about it is approximate.

`OpenPrompt` is the caller's end, `OpenPrompts` the engine's; `Reading` is what the engine's thread works on
(`read_along`).
"""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Self, Unpack

from kvcomm import values
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.language import Language
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.making import RequestMaker
from kvcomm.engine.reading import Begin, Followed, Keep, Reading, TokenIds, require_open
from kvcomm.engine.sampling import SamplingParams, SamplingSettings, sampling_params
from kvcomm.engine.scheduler import Scheduler
from kvcomm.engine.tenancy import Tenancy
from kvcomm.errors import InvalidRequest, KVCommError, kept
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import Weights
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.values import told

DEADLINE_S = 600.0
"""Seconds for which a prompt may be open."""


class OpenPrompts:
    """Opens the prompts of one engine, changes them and closes them, for whoever has them. Safe from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        loop: EngineLoop,
        maker: RequestMaker,
        language: Language,
        *,
        adapters: Adapters,
        pool: PagePool,
        tenancy: Tenancy,
        lock: RLock,
        max_context: int,
    ) -> None:
        """Make one.

        Args:
            max_context: tokens the model may see at most.
        """
        self._scheduler = scheduler
        self._read_along = scheduler.read_along
        self._adapters = adapters
        self._pool = pool
        self._loop = loop
        self._maker = maker
        self._language = language
        self._tenancy = tenancy
        self._lock = lock
        self._max_context = max_context

    def open_first(
        self, prompt: Prompt | None, adapter: str | None, tenant: str, policy: ReusePolicy | None, deadline_s: float
    ) -> OpenPrompt:
        """See `Engine.open_prompt`."""

        def begin(reading: Reading, segments: tuple[Segment, ...]) -> None:
            assert reading.sampling is not None
            request = self._maker.make_first(
                segments, reading.sampling, tenant=tenant, policy=policy, adapter=adapter, reading=reading
            )
            self._scheduler.submit(request)  # the loop is woken by whoever asks, unless that is the loop

        opened = self.open(KVSequence(self._pool), self._adapters.weights(adapter), tenant, deadline_s, begin)
        try:
            return opened if prompt is None else opened.append(prompt)
        except BaseException:
            opened.cancel()
            raise

    def open(self, past: KVSequence, weights: Weights, tenant: str, deadline_s: float, begin: Begin) -> OpenPrompt:
        """An open prompt behind what is there already.

        Args:
            past: forked; it stays the caller's.
            deadline_s: seconds after which it is given up if it is not complete by then.
            begin: makes and submits the request once it is complete, under the engine's lock.

        Raises:
            InvalidRequest: a deadline that is no positive number.
            EngineClosed: the engine has been closed.
        """
        seconds = values.real_number("deadline_s", deadline_s)
        if not seconds > 0:
            raise InvalidRequest(f"deadline_s must be a positive number of seconds, not {seconds}")
        namespace, owner = self._tenancy.namespace(weights, tenant), self._tenancy.home(tenant)
        with self._lock:
            self._loop.require_open()
            reading = Reading(
                request_id=self._maker.next_id(),
                namespace=namespace,
                tenant=tenant,
                owner=owner,
                weights=weights,
                sequence=past.fork(),  # the last thing that may fail: from here on somebody gives its pages back
                due_s=time.monotonic() + seconds,
                max_tokens=self._max_context,
                begin=begin,
            )
            self._read_along.add(reading)
        self._loop.wake()
        return OpenPrompt(self, reading)

    def read(self, reading: Reading, prompt: Prompt) -> tuple[Segment, ...]:
        """The checked segments of what is put behind it."""
        return self._language.reader.read(prompt, is_start=not reading.parts and not reading.num_before)

    def put(self, reading: Reading, *parts: Segment | Followed) -> None:
        """Put parts behind it; see `OpenPrompt.append` and `OpenPrompt.follow`."""
        with self._lock:
            try:
                require_open(reading)
                self._put(reading, [self._resolved(part) for part in parts])
            finally:
                self._read_along.touch()
        self._loop.wake()

    def follow(self, reading: Reading, source: RequestHandle, part: Followed) -> None:
        """Put the answer of a request behind it. Raises InvalidRequest: nobody learns of others' requests."""
        if not self._maker.has_made(source):
            raise InvalidRequest(f"request {source.request_id} is none of this engine's: follow where it is computed")
        if source.tenant != reading.tenant:
            raise InvalidRequest(f"there is no request {source.request_id} to follow")
        self.put(reading, part)

    def close(
        self, reading: Reading, sampling: SamplingParams | None, settings: SamplingSettings, prompt: Prompt | None
    ) -> RequestHandle:
        """See `OpenPrompt.close`."""
        params = sampling_params(sampling, settings)
        if params.grammar is not None:
            self._language.grammars.compile(params.grammar, owner=reading.tenant)  # not under the lock
        is_start = not reading.num_before
        whole = None if prompt is None else self._language.reader.read(prompt, is_start=is_start)
        with self._lock:
            require_open(reading)
            if whole is None and not reading.parts and is_start:
                raise InvalidRequest("the open prompt holds nothing; append a text, or follow an answer")
            reading.sampling, reading.prompt = params, whole
            reading.handle = handle = self._maker.handle(reading.tenant, partial(self.cancel, reading))
            self._read_along.begin_now(reading)
        self._loop.wake()
        return handle

    def cancel(self, reading: Reading) -> None:
        """See `OpenPrompt.cancel`."""
        with self._lock:
            self._read_along.cancel(reading)
        self._loop.wake()

    def _put(self, reading: Reading, parts: list[Segment | Followed]) -> None:
        for part in parts:
            if isinstance(part, Followed) and isinstance(part.source, Reading) and part.source.waits_for(reading):
                raise InvalidRequest("a prompt cannot follow itself, nor one that waits for it")
        reading.parts += parts
        try:
            reading.refresh()
        except KVCommError as error:
            reading.error, reading.is_cancelled = kept(error), True
            raise

    def _resolved(self, part: Segment | Followed) -> Segment | Followed:
        """What follows the request of a closed prompt that waits itself follows that prompt. Under the lock."""
        if isinstance(part, Segment) or isinstance(part.source, Reading):
            return part
        readings = self._read_along.readings.copy()
        other = next((each for each in readings if each.handle is part.source and not each.is_begun), None)
        return part if other is None else replace(part, source=other)


class OpenPrompt:
    """A prompt that is not complete yet; made by `Engine.open_prompt` or `Context.follow`. Thread-safe.

    Usable in a `with` statement, which cancels it unless it was closed.
    """

    def __init__(self, opened_by: OpenPrompts, reading: Reading) -> None:
        self._opened_by = opened_by
        self._reading = reading
        self.keeps: object = None  # the engine, which must not be collected while somebody has an open prompt of it
        # Weakly: what it follows may have failed, and frames of that error may know this very object.
        weakref.finalize(self, _forget, weakref.ref(reading))

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "given up" if self._reading.is_over else "open"
        return f"OpenPrompt({self.num_tokens} tokens, {self.num_read} read, {state})"

    @property
    def is_closed(self) -> bool:
        """Whether its answer was asked for."""
        return self._reading.handle is not None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, those of a context before it included."""
        return self._reading.sequence.num_tokens

    @property
    def num_read(self) -> int:
        """Known tokens whose KV is there already."""
        return self._reading.sequence.num_computed

    def append(self, prompt: Prompt) -> Self:
        """Put further text behind it, which is final.

        Raises:
            InvalidRequest: the prompt is closed, or the text is empty, or holds unknown tokens.
            PromptTooLong, SourceFailed, RequestCancelled: it has been given up, and why.
        """
        self._opened_by.put(self._reading, *self._opened_by.read(self._reading, prompt))
        return self

    def follow(self, source: RequestHandle | OpenPrompt, *, name: str = "answer", keep: Keep | None = None) -> Self:
        """Put the first answer of a request behind it, which is read while it is written.

        Args:
            source: the request, or an open prompt, whose answer will be asked for.
            name: of the segment that the answer becomes; as any other it may be moved where it is not read in time.
            keep: what of the answer's final ids is passed on; None: all.

        Raises:
            InvalidRequest: the prompt is closed, would wait for itself, or there is no such request of this tenant.
            PromptTooLong, SourceFailed, RequestCancelled: it has been given up, and why.
        """
        if not isinstance(source, RequestHandle | OpenPrompt):
            raise InvalidRequest(f"follow a RequestHandle or an OpenPrompt, not {told(source)}")
        if isinstance(source, OpenPrompt):
            other = source._reading
            if source._opened_by is not self._opened_by:
                raise InvalidRequest("an open prompt of another engine: follow where it is computed")
            if other.tenant != self._reading.tenant:
                raise InvalidRequest("there is no such prompt to follow")
            self._opened_by.put(self._reading, Followed(other, name, keep or _all))
        else:
            self._opened_by.follow(self._reading, source, Followed(source, name, keep or _all))
        return self

    def close(
        self,
        sampling: SamplingParams | None = None,
        *,
        prompt: Prompt | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> RequestHandle:
        """No more text comes: let the answer begin as soon as all that is followed has ended.

        Args:
            sampling: how to draw; or its fields by name, as in `Engine.submit`.
            prompt: the whole prompt (behind the context, if it stands behind one) as it has become, where the caller
                knows that: of what was read, the part that it begins with is used, and nothing is waited for.

        Returns:
            of the answer. What it follows may fail: then the handle raises SourceFailed. A cancelled handle gives the
            prompt's pages back, too.

        Raises:
            InvalidRequest: it is closed already, holds no token, or sampling settings are wrong.
            PromptTooLong, SourceFailed, RequestCancelled: it has been given up, and why.
        """
        handle = self._opened_by.close(self._reading, sampling, settings, prompt)
        handle.keeps = self.keeps
        return handle

    def cancel(self) -> None:
        """Give it up: pages are returned, at the latest when a pass over them ends, and what follows it fails.

        No effect once it has ended.
        """
        self._opened_by.cancel(self._reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.is_closed:
            self.cancel()


def _all(token_ids: TokenIds) -> TokenIds:
    return token_ids


def _forget(known: weakref.ref[Reading]) -> None:
    """Its user has forgotten it: without an answer to come nobody can want it. If the engine has it still, that is."""
    reading = known()
    if reading is not None and reading.handle is None:
        reading.is_cancelled = True
