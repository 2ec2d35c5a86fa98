"""A context: the KV state after a path of segments, as a handle for users.

A context owns a sequence and with it references on its pages. Extending computes at once; forking shares every page
and copies no bytes; generating lends the sequence to a request, which writes the answer behind it. While a request
runs the context is busy: it can be forked (the child sees what is known at that moment, never later) and read, but not
extended. A request that fails or is cancelled leaves the context as it was before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self, Unpack

from torch import Tensor
from transformers import DynamicCache

from kvcomm.engine.context_tools import ContextTools
from kvcomm.engine.exchange import ContextState
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.open_prompt import DEADLINE_S, OpenPrompt
from kvcomm.engine.reading import Reading
from kvcomm.engine.request import ANSWER, Carried, Request
from kvcomm.engine.results import Chunk, Completion
from kvcomm.engine.sampling import SamplingParams, SamplingSettings, sampling_params
from kvcomm.errors import ContextBusy, ContextReleased, InvalidRequest
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Prompt, Segment, token_ids_of
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import Weights
from kvcomm.plain import short
from kvcomm.reuse.healing import Healing
from kvcomm.reuse.policy import ReusePolicy

PREFILL_ONLY = SamplingParams(max_new_tokens=0)
"""Computes a prompt and generates nothing."""


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
        tools: ContextTools,
        sequence: KVSequence,
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
        keeps: object = None,
    ) -> None:
        """Make one; see the class.

        Args:
            keeps: the engine, which must not be collected while somebody has a context of it.
        """
        self._tools = tools
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
        self._keeps = keeps
        with tools.lock:
            tools.holdings.add(self, sequence, tools.tenancy.home(tenant))
            tools.living[id(sequence)] = self

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
        return self._tools.language.texts.decode(self.tokens)

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
        with self._tools.lock:
            segments = self._segments
            logits = None if self.busy else self._last_logits
            sequence = self._sequence.fork()
            grown = sequence.num_tokens - sum(len(segment.token_ids) for segment in segments)
            if grown:
                segments = (*segments, Segment(tuple(sequence.token_ids[-grown:].tolist()), ANSWER))
            return Context(
                self._tools,
                sequence,
                tenant=self.tenant,
                weights=self.weights,
                adapter=self.adapter,
                name=name,
                segments=segments,
                last_logits=logits,
                policy=self.policy,
                keeps=self._keeps,
            )

    def generate(self, sampling: SamplingParams | None = None, **settings: Unpack[SamplingSettings]) -> Completion:
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
        self,
        sampling: SamplingParams | None = None,
        *,
        prompt: Prompt | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> RequestHandle:
        """`generate` without waiting.

        Args:
            prompt: to be put behind the context first, in the same request: kept with the answer, or neither is. With
                `PREFILL_ONLY` this is `extend` without waiting.
        """
        params = sampling_params(sampling, settings)
        if params.grammar is not None:
            self._tools.language.grammars.compile(params.grammar, owner=self.tenant)  # not under the lock
        segments = () if prompt is None else self._tools.language.reader.read(prompt, is_start=self.num_tokens == 0)
        with self._tools.lock:
            self._require_idle()
            self._request = self._lend(segments, params)
            self._request.keeps = self._keeps
            return self._request

    def stream(self, sampling: SamplingParams | None = None, **settings: Unpack[SamplingSettings]) -> Iterator[Chunk]:
        """`generate`, chunk by chunk. Leaving the loop early cancels the request."""
        return iter(self.submit(sampling_params(sampling, settings)))

    def astream(
        self, sampling: SamplingParams | None = None, **settings: Unpack[SamplingSettings]
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio."""
        return aiter(self.submit(sampling_params(sampling, settings)))

    async def agenerate(
        self, sampling: SamplingParams | None = None, **settings: Unpack[SamplingSettings]
    ) -> Completion:
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
        opened = self._tools.open_prompts.open(
            self._sequence, self._weights_now(), self.tenant, deadline_s, self._begin
        )
        opened.keeps = self._keeps
        try:
            return opened.follow(source, name=name)
        except BaseException:
            opened.cancel()
            raise

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
        file = Path(file)
        namespace = self._tools.tenancy.namespace(self.weights, self.tenant)
        with self.fork(name=self.name) as copy:
            state = ContextState(
                copy.tokens, copy.segments, copy.name, self.note, copy.fidelity, last_logits=copy._last_logits
            )
            self._tools.exchange.save(file, namespace, copy._sequence, state, is_new=not replace)
        return file

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
        self._weights_now()
        with self.fork() as copy:
            return self._tools.exchange.to_hf_cache(copy._sequence, self._tools.config, whole=whole)

    def repair(self) -> Future[bool]:
        """Replace approximate KV by what computing it exactly gives, in idle time; tokens stay as they are.

        The future gives whether the context is exact now: False if it was released or rolled back meanwhile. Forks
        taken before stay as they are. Until then the context can be used as ever.

        Raises:
            ContextReleased: there is nothing to repair.
            WeightsChanged: see `extend`.
        """
        self._require_alive()
        weights = self._weights_now()
        namespace = self._tools.tenancy.namespace(weights, self.tenant)
        return self._tools.repairer.repair(namespace, weights, self._sequence, self._take_over)

    def release(self) -> None:
        """Give the pages back; a running request is cancelled first. Idempotent."""
        if self._released:
            return
        self._released = True
        if self._request is not None:
            self._request.cancel()
            self._request.wait()
        with self._tools.lock:
            self._sequence.release()
            self._last_logits = None
            self._tools.holdings.drop(self._sequence)
            self._tools.living.pop(id(self._sequence), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def sequence(self) -> KVSequence:
        """The tokens and pages; written only by the request that they are lent to."""
        return self._sequence

    @property
    def ready_logits(self) -> Tensor | None:
        """Logits behind the last token, [vocab_size], if that token's pass was the last one."""
        return self._last_logits

    def _begin(self, reading: Reading, segments: tuple[Segment, ...]) -> None:
        """An open prompt behind the context is complete. Under the lock.

        Raises:
            ContextReleased, ContextBusy: the context cannot be written.
        """
        assert reading.sampling is not None
        self._require_idle()
        self._request = self._lend(segments, reading.sampling, reading)

    def _lend(
        self, segments: tuple[Segment, ...], sampling: SamplingParams, reading: Reading | None = None
    ) -> RequestHandle:
        """Append segments to the sequence and run a request on it. Under the lock.

        Args:
            reading: the open prompt that the segments have been.
        """
        tools, sequence, num_kept = self._tools, self._sequence, self._sequence.num_tokens
        weights = self._weights_now()
        new_tokens = token_ids_of(segments)
        if not num_kept and not new_tokens:
            raise InvalidRequest("the context is empty; extend it before generating")
        if num_kept and sampling.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs are not there behind a context: what it holds is not computed again")
        is_fork = sampling.n > 1  # several answers cannot all stand behind the context: it stays as it is
        target = sequence.fork() if is_fork else sequence
        target.append(new_tokens)
        try:
            request = tools.maker.make(
                target,
                (*self._segments, *segments),
                sampling,
                tenant=self.tenant,
                policy=self.policy,
                weights=weights,
                adapter=self.adapter,
                is_lent=not is_fork,
                reading=reading,
            )
            request.num_kept_tokens = num_kept
            request.carried = self._carried
            if not new_tokens:
                request.ready_logits = self._last_logits
            if not is_fork:
                request.on_success = lambda: self._complete(request, segments)
                request.on_healed = self._repaired
            tools.scheduler.submit(request)
        except BaseException:
            if is_fork:
                target.release()
            else:
                target.truncate(num_kept)
            raise
        if reading is None:
            tools.loop.wake()  # else whoever has closed the prompt does so
        return request.handle

    def _complete(self, request: Request, segments: tuple[Segment, ...]) -> None:
        """A request on the own sequence has succeeded. Under the lock."""
        answer = request.completion().token_ids
        self._segments += segments
        if answer:
            self._segments += (Segment(answer, ANSWER),)
        # Behind an answer the logits at hand are those of an earlier token, unless nothing was kept of it.
        self._last_logits = None if answer else request.exact_logits
        is_reported = request.sampling.max_new_tokens > 0
        self._carried = Carried() if is_reported else self._carried.plus(request.plan, request.num_tier_tokens)
        self.weights = request.weights

    def _take_over(self, healing: Healing) -> tuple[Segment, ...] | None:
        """Go on with exact KV, unless a request is writing. Under the lock."""
        if self.busy:
            return None
        healing.put_in_place()
        self._repaired()
        return self._segments

    def _repaired(self) -> None:
        """The KV is exact now; what was noted about the former one is forgotten. Under the lock."""
        self._last_logits = None
        self._carried = Carried()

    def _weights_now(self) -> Weights:
        """The weights to go on with; raises WeightsChanged where they are not those that computed the context."""
        known = self.weights if self.num_tokens else None
        self.weights = self._tools.adapters.weights_to_go_on(self.adapter, known, f"context {self.name or ''}")
        return self.weights

    def _require_alive(self) -> None:
        if self._released:
            raise ContextReleased(f"context {self.name or ''} was released; fork or create another one")

    def _require_idle(self) -> None:
        self._require_alive()
        if self.busy:
            raise ContextBusy(f"context {self.name or ''} has a request in flight; wait for it, or fork the context")
