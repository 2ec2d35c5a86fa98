"""A context: the KV state after a path of segments, as a handle for users.

A context owns a sequence and with it references on its pages. Extending computes at once; forking shares every page
and copies no bytes; generating lends the sequence to a request, which writes the answer behind it. While a request
runs the context is busy: it can be forked (the child sees what is known at that moment, never later) and read, but not
extended. A request that fails or is cancelled leaves the context as it was before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor
from transformers import DynamicCache

from kvcomm.engine.grammar import Grammar
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.open_prompt import DEADLINE_S, OpenPrompt, Reading
from kvcomm.engine.prompts import Prompt
from kvcomm.engine.request import ANSWER, Carried, Request
from kvcomm.engine.results import Chunk, Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import ContextBusy, ContextReleased, InvalidRequest
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence
from kvcomm.model.live import Weights
from kvcomm.plain import short
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.values import told

JSON_SCHEMA = "json_schema"
"""A setting that is short for a grammar."""

PREFILL_ONLY = SamplingParams(max_new_tokens=0)
"""Computes a prompt and generates nothing."""


class ContextHost(Protocol):
    """What a context needs from its engine."""

    @property
    def lock(self) -> RLock: ...

    def decode(self, token_ids: tuple[int, ...]) -> str: ...

    def read_prompt(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]: ...

    def submit_lent(
        self,
        context: Context,
        sequence: Sequence,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        reading: Reading | None = None,
    ) -> RequestHandle: ...

    def open_behind(self, context: Context, deadline_s: float) -> OpenPrompt: ...

    def compile_grammar(self, grammar: Grammar, *, tenant: str) -> None: ...

    def add_context(self, context: Context) -> None: ...

    def drop_context(self, context: Context) -> None: ...

    def save_snapshot(self, context: Context, file: Path, *, replace: bool) -> Path: ...

    def copy_to_hf_cache(self, context: Context, *, whole: bool) -> DynamicCache: ...

    def repair(self, context: Context) -> Future[bool]: ...


class Context:
    """Made by `Engine.context`, `Context.fork` or `Engine.restore`; not to be constructed otherwise.

    Usable in a `with` statement, which releases it.

    Attributes:
        weights: those that computed it. While the model, or the adapter, has others it can be read, forked and saved,
            but not be gone on with.
        adapter: that it names; None: the model as its user leaves it.
        note: a text of its user's, kept in snapshots and otherwise left alone; forks begin without one.
    """

    def __init__(
        self,
        engine: ContextHost,
        sequence: Sequence,
        *,
        tenant: str,
        weights: Weights,
        adapter: str | None = None,
        name: str | None = None,
        segments: tuple[Segment, ...] = (),
        last_logits: Tensor | None = None,
        carried: Carried | None = None,
        policy: ReusePolicy | None = None,
        note: str | None = None,
    ) -> None:
        self._engine = engine
        self._sequence = sequence
        self._segments = segments
        self._last_logits = last_logits
        self._carried = carried or Carried()
        self._request: RequestHandle | None = None
        self._released = False
        self.tenant = tenant
        self.weights = weights
        self.adapter = adapter
        self.name = name
        self.policy = policy
        self.note = note
        engine.add_context(self)

    def __repr__(self) -> str:
        state = "released" if self._released else "busy" if self.busy else "ready"
        name = "" if self.name is None else f"{short(self.name)}, "
        return f"Context({name}{self._sequence.num_tokens} tokens, {self.fidelity.value}, {state})"

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every token of the context, generated ones included."""
        return tuple(self._sequence.token_ids.tolist())

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self._sequence.num_tokens

    @property
    def num_pages(self) -> int:
        """Pages of the pool this context refers to; forks refer to the same ones."""
        return self._sequence.num_pages

    @property
    def text(self) -> str:
        """The tokens decoded, special tokens included."""
        return self._engine.decode(self.tokens)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The path: what the context was built from, in order."""
        return self._segments

    @property
    def fidelity(self) -> Fidelity:
        """Exact unless any of its KV is approximate."""
        return self._sequence.fidelity

    @property
    def busy(self) -> bool:
        """Whether a request is running on this context."""
        return self._request is not None and not self._request.done

    @property
    def released(self) -> bool:
        """Whether the context has been released."""
        return self._released

    def extend(self, prompt: Prompt) -> Self:
        """Compute further text behind the context, now. Returns the context itself.

        Raises:
            ContextReleased, ContextBusy: the context cannot be written.
            WeightsChanged: the model, or the adapter, has other weights now than those that computed the context.
            InvalidRequest: empty, too long, or unknown tokens; the context is unchanged.
            PoolExhausted: no pages; the context is unchanged.
        """
        self.submit(PREFILL_ONLY, prompt=prompt).result()
        return self

    def fork(self, *, name: str | None = None) -> Context:
        """A new context with the same past. Shares every page, copies no bytes; also while this one is busy.

        Raises:
            ContextReleased: there is nothing to fork.
        """
        self._require_alive()
        with self._engine.lock:
            segments = self._segments
            logits = None if self.busy else self._last_logits
            sequence = self._sequence.fork()
            grown = sequence.num_tokens - sum(len(segment.token_ids) for segment in segments)
            if grown:
                segments = (*segments, Segment(tuple(sequence.token_ids[-grown:].tolist()), ANSWER))
            return Context(
                self._engine,
                sequence,
                tenant=self.tenant,
                weights=self.weights,
                adapter=self.adapter,
                name=name,
                segments=segments,
                last_logits=logits,
                policy=self.policy,
            )

    def generate(self, sampling: SamplingParams | None = None, **settings: object) -> Completion:
        """Generate an answer behind the context and keep it there (with `n` > 1 the context stays as it is).

        Args:
            sampling: how to draw; or give its fields as keywords, as in `generate(max_new_tokens=64)`. With either,
                `json_schema` is short for `grammar=Grammar.json_schema(...)`.

        Raises:
            ContextReleased, ContextBusy: the context cannot be written.
            WeightsChanged: see `extend`; or the weights changed while the answer was computed.
            InvalidRequest: sampling settings, or prompt and answer exceed the model's limit.
            PoolExhausted, NumericalError, RequestCancelled: nothing was kept.
        """
        return self.submit(sampling_params(sampling, settings)).result()

    def submit(
        self, sampling: SamplingParams | None = None, *, prompt: Prompt | None = None, **settings: object
    ) -> RequestHandle:
        """`generate` without waiting.

        Args:
            prompt: to be put behind the context first, in the same request: kept with the answer, or neither is. With
                `PREFILL_ONLY` this is `extend` without waiting.
        """
        params = sampling_params(sampling, settings)
        if params.grammar is not None:
            self._engine.compile_grammar(params.grammar, tenant=self.tenant)  # not under the lock
        segments = () if prompt is None else self._engine.read_prompt(prompt, is_start=self.num_tokens == 0)
        return self._write(segments, params)

    def stream(self, sampling: SamplingParams | None = None, **settings: object) -> Iterator[Chunk]:
        """`generate`, chunk by chunk. Leaving the loop early cancels the request."""
        return iter(self.submit(sampling_params(sampling, settings)))

    def astream(self, sampling: SamplingParams | None = None, **settings: object) -> AsyncIterator[Chunk]:
        """`stream` for asyncio."""
        return aiter(self.submit(sampling_params(sampling, settings)))

    async def agenerate(self, sampling: SamplingParams | None = None, **settings: object) -> Completion:
        """`generate` for asyncio."""
        return await self.submit(sampling_params(sampling, settings)).aresult()

    def follow(
        self, source: RequestHandle | OpenPrompt, *, name: str = ANSWER, deadline_s: float = DEADLINE_S
    ) -> OpenPrompt:
        """Read the answer of a request in flight while it is written; closing what this returns starts an answer to it.

        The context itself stays as it is until then, and can be used as ever; what is read is behind what it holds now.
        What follows, the answer included, is kept as by `submit` with a prompt.

        Args:
            name: of the segment that the answer becomes.
            deadline_s: seconds after which it is given up if it is not complete by then.

        Raises:
            ContextReleased: there is nothing to go on from.
            WeightsChanged: see `extend`.
            InvalidRequest: there is no such request of this tenant.
        """
        self._require_alive()
        opened = self._engine.open_behind(self, deadline_s)
        try:
            return opened.follow(source, name=name)
        except BaseException:
            opened.cancel()
            raise

    def begin(self, reading: Reading, segments: tuple[Segment, ...]) -> None:
        """For the engine, under its lock: an open prompt behind the context is complete.

        Raises:
            ContextReleased, ContextBusy: the context cannot be written.
        """
        assert reading.sampling is not None
        self._require_idle()
        self._request = self._engine.submit_lent(self, self._sequence, segments, reading.sampling, reading)

    def save(self, file: str | Path, *, replace: bool = True) -> Path:
        """Write a snapshot; `Engine.restore` reads it. The file appears whole or not at all.

        Args:
            replace: a file of that name that is there by the time this one is written; False: of several who save
                under one name at once, one does.

        Raises:
            ContextReleased, ContextBusy: there is no state to save.
            SnapshotExists: there is a file, and it is not to be replaced.
            SnapshotError: the file cannot be written.
        """
        self._require_idle()
        return self._engine.save_snapshot(self, Path(file), replace=replace)

    def to_hf_cache(self, *, whole: bool = False) -> DynamicCache:
        """A copy of the KV as a transformers cache: `generate(ids, past_key_values=cache)` goes on from it.

        Args:
            whole: with the KV of the last token, if that is computed. Stock `generate` needs a token to compute: given
                a cache as long as its prompt, it computes the prompt a second time behind itself, and says nothing.
                Right for calls of the model with further tokens.

        Raises:
            ContextReleased, ContextBusy: there is no state to copy.
            WeightsChanged: stock `generate` would go on with other weights than those that computed it.
        """
        self._require_idle()
        return self._engine.copy_to_hf_cache(self, whole=whole)

    def repair(self) -> Future[bool]:
        """Replace approximate KV by what computing it exactly gives, in idle time; tokens stay as they are.

        The future gives whether the context is exact now: False if it was released or rolled back meanwhile. Forks
        taken before stay as they are. Until then the context can be used as ever.

        Raises:
            ContextReleased: there is nothing to repair.
            WeightsChanged: see `extend`.
        """
        self._require_alive()
        return self._engine.repair(self)

    def release(self) -> None:
        """Give the pages back; a running request is cancelled first. Idempotent."""
        if self._released:
            return
        self._released = True
        if self._request is not None:
            self._request.cancel()
            self._request.wait()
        with self._engine.lock:
            self._sequence.release()
            self._last_logits = None
            self._engine.drop_context(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def sequence(self) -> Sequence:
        """For the engine: the tokens and pages; written only by the request they are lent to."""
        return self._sequence

    @property
    def ready_logits(self) -> Tensor | None:
        """For the engine: logits behind the last token, [vocab_size], if that token's pass was the last one."""
        return self._last_logits

    @property
    def carried(self) -> Carried:
        """For the engine: prompt tokens computed by extensions that no answer has reported yet."""
        return self._carried

    def repaired(self) -> None:
        """For the engine, under its lock: the KV is exact now; what was noted about the former one is forgotten."""
        self._last_logits = None
        self._carried = Carried()

    def complete(self, request: Request, segments: tuple[Segment, ...]) -> None:
        """For the engine, under its lock: a request on the own sequence has succeeded."""
        answer = request.completion().token_ids
        self._segments += segments
        if answer:
            self._segments += (Segment(answer, ANSWER),)
        # Behind an answer the logits at hand are those of an earlier token, unless nothing was kept of it.
        self._last_logits = None if answer else request.exact_logits
        is_reported = request.sampling.max_new_tokens > 0
        self._carried = Carried() if is_reported else self._carried.plus(request.plan, request.num_tier_tokens)

    def _write(self, segments: tuple[Segment, ...], sampling: SamplingParams) -> RequestHandle:
        with self._engine.lock:
            self._require_idle()
            self._request = self._engine.submit_lent(self, self._sequence, segments, sampling)
            return self._request

    def _require_alive(self) -> None:
        if self._released:
            raise ContextReleased(f"context {self.name or ''} was released; fork or create another one")

    def _require_idle(self) -> None:
        self._require_alive()
        if self.busy:
            raise ContextBusy(f"context {self.name or ''} has a request in flight; wait for it, or fork the context")


def sampling_params(sampling: SamplingParams | None, settings: dict[str, object]) -> SamplingParams:
    """Either a ready object or its fields; with either of them `json_schema` is short for a grammar made of it.

    Raises:
        InvalidRequest: both are given, a field is unknown, or `sampling` is something else.
    """
    if not isinstance(sampling, SamplingParams | None):
        raise InvalidRequest(f"sampling must be a SamplingParams, not {told(sampling)}; or give its fields by name")
    fields = {key: value for key, value in settings.items() if key != JSON_SCHEMA}
    if sampling is not None and fields:
        raise InvalidRequest(f"give either a SamplingParams or its fields, not both ({sorted(fields)})")
    unknown = sorted(fields.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        known = sorted((*SamplingParams.__dataclass_fields__, JSON_SCHEMA))
        raise InvalidRequest(f"unknown sampling settings {unknown}; known: {known}")
    params = sampling or SamplingParams(**fields)  # type: ignore[arg-type]
    return params if settings.get(JSON_SCHEMA) is None else _with_schema(params, settings[JSON_SCHEMA])


def _with_schema(params: SamplingParams, schema: object) -> SamplingParams:
    if params.grammar is not None:
        raise InvalidRequest("give either a grammar or a json_schema, not both")
    return replace(params, grammar=Grammar.json_schema(schema))  # type: ignore[arg-type]
