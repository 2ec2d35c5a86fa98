"""A worker's side: prompts are prepared here, by kvcomm's engine on the worker's model or from a tier, until vLLM takes
them into its pages. Knows no vLLM; pages are whatever fulfils `Pages`.

Exact KV of vLLM's own kernels is kept in the tier under the name of its producer. KV that kvcomm's engine computed
never goes there from here, and reaches only requests that allow approximation, whose blocks nobody else can name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvcomm.engine.context import PREFILL_ONLY, Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.language import end_token_ids
from kvcomm.engine.results import Usage
from kvcomm.errors import KVCommError
from kvcomm.integrations.vllm.fair_lock import FairLock
from kvcomm.integrations.vllm.inner import kv_of_context
from kvcomm.integrations.vllm.messages import Load, Prepare, Prepared, Release, Save, UsageValues
from kvcomm.integrations.vllm.params import RequestParams
from kvcomm.memory.segments import Segment

logger = logging.getLogger("kvcomm.vllm")

KVLists = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Keys and values, per layer [num_tokens, num_kv_heads, dim]."""

NUM_READERS = 4


class Pages(Protocol):
    """Where vLLM keeps KV."""

    def read(self, blocks: Sequence[int], start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of keys and values of positions `[start, end)`."""
        ...

    def write(self, blocks: Sequence[int], start: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Put keys and values into pages from position `start` on."""
        ...


class Shelf(Protocol):
    """Where exact KV is kept for others, see `shelf`."""

    def find(self, token_ids: Sequence[int], params: RequestParams) -> KVLists | None:
        """KV of the longest prefix that is there and worth it."""
        ...

    def keep(self, token_ids: Sequence[int], kv: KVLists, start: int, params: RequestParams) -> None:
        """Keep KV of `token_ids[start:]`, later."""
        ...

    def close(self) -> None:
        """Write what waits."""
        ...


@dataclass
class _Work:
    """One request's prompt.

    Attributes:
        handle: of kvcomm's engine, and the context that it fills.
        found: what a tier gives.
    """

    prepare: Prepare
    context: Context | None = None
    handle: RequestHandle | None = None
    found: Future[KVLists | None] | None = None
    is_told: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes."""
        return (self.handle is None or self.handle.done) and (self.found is None or self.found.done())


class Preparations:
    """The prompts of one worker. Called from the worker's thread only."""

    def __init__(self, pages: Pages, turns: FairLock, engine: Engine | None, shelf: Shelf | None) -> None:
        """Make one.

        Args:
            engine: on this worker's model; None: nothing is moved.
            shelf: None: nothing is shared.
        """
        self._pages = pages
        self._turns = turns
        self._engine = engine
        self._shelf = shelf
        self._ends = frozenset() if engine is None else end_token_ids(engine.model, engine.tokenizer)
        self._works: dict[str, _Work] = {}
        self._num_urgent = 0
        self._readers = ThreadPoolExecutor(NUM_READERS, "kvcomm-tier") if shelf is not None else None
        # A context is released when its request has ended, and that may wait for a turn which this thread has.
        self._endings = ThreadPoolExecutor(1, "kvcomm-endings")
        self._changed = threading.Event()

    @property
    def engine(self) -> Engine | None:
        """On this worker's model."""
        return self._engine

    @property
    def shelf(self) -> Shelf | None:
        """Where exact KV is kept for others."""
        return self._shelf

    @property
    def num_open(self) -> int:
        """Requests that wait for what is prepared."""
        return sum(not work.is_told for work in self._works.values())

    @property
    def num_held(self) -> int:
        """Requests for which something is held."""
        return len(self._works)

    def begin(self, prepare: Prepare) -> None:
        """Start to prepare a prompt."""
        work = self._works[prepare.request_id] = _Work(prepare)
        try:
            if prepare.moves and self._engine is not None:
                self._compute(work, self._engine)
            elif self._shelf is not None and self._readers is not None:
                find = self._shelf.find
                work.found = self._readers.submit(find, prepare.token_ids, prepare.params)
                work.found.add_done_callback(lambda _: self._changed.set())
        except Exception as error:  # whatever it was: vLLM computes the prompt
            logger.info("request %s is left to vLLM: %r", prepare.request_id, error)
            self._give_up(work)
        self._count_urgent()

    def wait(self, timeout_s: float) -> None:
        """Wait until something is ready that was not told yet, or for so long."""
        ends_s = time.monotonic() + timeout_s
        while not any(work.is_done for work in self._works.values() if not work.is_told):
            handles = [work.handle for work in self._works.values() if work.handle and not work.handle.done]
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                return
            if handles:
                handles[0].wait(min(left_s, 0.01 if len(handles) > 1 else left_s))
            else:
                self._changed.wait(left_s)
                self._changed.clear()

    def take_prepared(self) -> dict[str, Prepared]:
        """What has become ready since the last call, by request."""
        ready: dict[str, Prepared] = {}
        for request_id, work in self._works.items():
            if not work.is_told and work.is_done:
                work.is_told = True
                ready[request_id] = self._outcome(work)
        self._count_urgent()
        return ready

    def load(self, load: Load) -> bool:
        """Put prepared KV into pages; False: it is not there any more."""
        work = self._works.get(load.request_id)
        kv = None if work is None else self._kv_of(work)
        if kv is None or len(kv[0][0]) < load.end:
            return False
        keys, values = ([layer[load.start : load.end] for layer in layers] for layers in kv)
        self._pages.write(load.blocks, load.start, keys, values)
        return True

    def save(self, save: Save) -> None:
        """Keep exact KV out of pages; they may be used anew afterwards."""
        if self._shelf is None:
            return
        kv = self._pages.read(save.blocks, save.start, len(save.token_ids))
        self._shelf.keep(save.token_ids, kv, save.start, save.params)

    def drop(self, drop: Release) -> None:
        """A request has ended; what its answer gives other prompts is computed when nobody waits."""
        work = self._works.pop(drop.request_id, None)
        if work is None:
            return
        answer = self._without_end(drop.answer)
        if answer and work.context is not None and work.is_done and not work.context.released:
            self._publish(work.context, Segment(answer, drop.name))
        else:
            self._give_up(work)
        self._count_urgent()

    def forget(self) -> None:
        """Drop what the engine has cached; prompts that are being prepared keep what they have."""
        if self._engine is not None:
            self._engine.cache.clear()

    def close(self) -> None:
        """Give up all that is held."""
        for work in self._works.values():
            self._give_up(work)
        self._works.clear()
        self._count_urgent()
        self._turns.close()
        self._endings.shutdown()
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        if self._engine is not None:
            self._engine.close()
        if self._shelf is not None:
            self._shelf.close()

    def _compute(self, work: _Work, engine: Engine) -> None:
        prepare = work.prepare
        segments = prepare.params.split(prepare.token_ids)
        work.context = engine.empty_context(tenant=prepare.params.tenant, policy=prepare.params.policy)
        work.handle = work.context.submit(PREFILL_ONLY, prompt=segments)

    def _without_end(self, answer: tuple[int, ...]) -> tuple[int, ...]:
        """An answer as it is passed on: without the token that ended it."""
        return answer[:-1] if answer and answer[-1] in self._ends else answer

    def _publish(self, context: Context, answer: Segment) -> None:
        """Let other prompts move an answer: compute it behind its prompt, then let the context go."""
        try:
            handle = context.submit(PREFILL_ONLY, prompt=[answer])
        except KVCommError as error:
            logger.info("an answer is nobody's source: %s", error)
            self._endings.submit(context.release)
            return
        self._endings.submit(_release_after, handle, context)

    def _outcome(self, work: _Work) -> Prepared:
        try:
            if work.handle is not None:
                usage = work.handle.result().usage
                return Prepared(len(work.prepare.token_ids), _told(usage))
            if work.found is not None and (found := work.found.result()) is not None:
                num = len(found[0][0])
                return Prepared(num, {"tier_tokens": num})
        except Exception as error:  # whatever it was: vLLM computes the prompt
            logger.warning("request %s is left to vLLM: %r", work.prepare.request_id, error)
            self._give_up(work)
        return Prepared(0)

    def _kv_of(self, work: _Work) -> KVLists | None:
        if work.context is not None and not work.context.released:
            return kv_of_context(work.context)
        if work.found is not None and work.found.done() and not work.found.cancelled():
            return work.found.result()
        return None

    def _give_up(self, work: _Work) -> None:
        if work.handle is not None:
            work.handle.cancel()
        if work.context is not None:
            self._endings.submit(work.context.release)
        if work.found is not None:
            work.found.cancel()

    def _count_urgent(self) -> None:
        num = sum(work.handle is not None and not work.is_told for work in self._works.values())
        self._turns.add_urgent(num - self._num_urgent)
        self._num_urgent = num


def _release_after(handle: RequestHandle, context: Context) -> None:
    handle.wait()
    context.release()


def _told(usage: Usage) -> UsageValues:
    """What a client is told about a prompt that kvcomm's engine prepared."""
    told: UsageValues = {
        "prompt_tokens": usage.prompt_tokens,
        "exact_tokens": usage.exact_tokens,
        "aligned_tokens": usage.aligned_tokens,
        "computed_tokens": usage.computed_tokens,
        "reasons": dict(usage.reasons),
    }
    if usage.bound is not None:
        told["bound"] = {
            "max_divergence": usage.bound.max_divergence,
            "confidence": usage.bound.confidence,
            "level": None if usage.bound.level is None else usage.bound.level.value,
            "pairs": usage.bound.num_pairs,
        }
    if usage.approximation is not None:
        told["rung"] = usage.approximation.rung
        told["predicted_divergence"] = usage.approximation.predicted
    return told
