"""One cluster, event by event: arrivals are routed, queue, are computed and answered.

A worker computes one prompt at a time, first come, first served, with the decode steps of its running answers between
the chunks of it. What it holds is looked up when its turn comes; what it computed is there for others, on the worker
and later in the tier, when the prompt is done. From the tier it gets only what is quicker to get than to compute. An
answer lasts its tokens times a step; its own KV is not kept, because traces do not say which block it would be.

What is left out: answers that wait for memory, preemption, a tier or network that is busy with others, workers that
fail, moved segments (traces know prefixes only).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eval.cluster.caches import PrefixCache, SharedTier
from eval.cluster.costs import Costs
from eval.cluster.routers import Cluster, MakeRouter
from eval.cluster.workload import Arrival, Workload


@dataclass(frozen=True)
class Outcome:
    """What one router made of a workload.

    Attributes:
        ttft_s: [num_requests], from arrival to first token.
        prompt_tokens, hit_tokens, tier_tokens, computed_tokens: of all prompts; the last three add up to the first.
        bytes_read, bytes_written: between workers and the tier.
        busy_s: seconds that each worker computed, [num_workers].
        span_s: from the first arrival to the last first token.
    """

    ttft_s: npt.NDArray[np.float64]
    prompt_tokens: int
    hit_tokens: int
    tier_tokens: int
    computed_tokens: int
    bytes_read: int
    bytes_written: int
    busy_s: npt.NDArray[np.float64]
    span_s: float

    @property
    def hit_rate(self) -> float:
        """Tokens that the worker held itself, of all."""
        return self.hit_tokens / max(self.prompt_tokens, 1)

    @property
    def utilisation(self) -> float:
        """Mean share of the time that a worker was busy."""
        return float(self.busy_s.mean()) / max(self.span_s, 1e-12)


class _Kind(IntEnum):
    first_token = 0
    done = 1


class _Served(NamedTuple):
    """How a prompt is made ready."""

    hit: int
    tier: int
    computed: int
    seconds: float


@dataclass
class _Worker:
    cache: PrefixCache
    waiting: deque[int] = field(default_factory=deque)
    is_busy: bool = False
    num_answers: int = 0


class Simulation:
    """One run; used once.

    Args:
        speed: how many seconds of the trace pass in a second.
        capacity_tokens: of each worker's cache.
        tier: None: there is none.
    """

    def __init__(
        self,
        workload: Workload,
        make_router: MakeRouter,
        costs: Costs,
        *,
        num_workers: int,
        capacity_tokens: int,
        speed: float,
        seed: int = 0,
        tier: SharedTier | None = None,
    ) -> None:
        self._workload, self._costs, self._tier = workload, costs, tier
        self._cluster = Cluster(num_workers, block_tokens=workload.block_tokens, capacity_tokens=capacity_tokens)
        self._router = make_router(self._cluster, np.random.default_rng(seed))
        blocks = max(1, capacity_tokens // workload.block_tokens)
        self._workers = [_Worker(PrefixCache(blocks)) for _ in range(num_workers)]
        self._events: list[tuple[float, int, _Kind, int, int]] = []
        self._num_events = 0
        self._arrived_at = [arrival.at / speed for arrival in workload.arrivals]
        self._next: dict[int, list[int]] = {}  # request -> those that are due and wait for its answer
        self._answered: set[int] = set()
        self._ttft = np.zeros(len(workload.arrivals))
        self._busy = np.zeros(num_workers)
        self._hit = self._from_tier = self._computed = self._read = self._written = 0
        self._last = 0.0

    def run(self) -> Outcome:
        """All requests, to the last first token."""
        for index, arrival in enumerate(self._workload.arrivals):
            now = self._arrived_at[index]
            self._until(now)
            if arrival.after is None or arrival.after in self._answered:
                self._arrive(index, now)
            else:
                self._next.setdefault(arrival.after, []).append(index)
        self._until(float("inf"))
        return Outcome(
            self._ttft,
            self._hit + self._from_tier + self._computed,
            self._hit,
            self._from_tier,
            self._computed,
            self._read,
            self._written,
            self._busy,
            self._last - min(self._arrived_at, default=0.0),
        )

    def _arrive(self, index: int, now: float) -> None:
        arrival = self._workload.arrivals[index]
        self._arrived_at[index] = now
        depth = 0 if self._tier is None else self._tier.depth(arrival.path, now)
        number = self._router.choose(arrival, now, depth)
        self._router.sent(number, index, arrival)
        self._cluster.sent(number)
        worker = self._workers[number]
        worker.waiting.append(index)
        if not worker.is_busy:
            self._start(number, now)

    def _until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, _, kind, number, index = heapq.heappop(self._events)
            if kind is _Kind.first_token:
                self._first_token(number, index, at)
            else:
                self._done(number, index, at)

    def _done(self, number: int, index: int, now: float) -> None:
        self._workers[number].num_answers -= 1
        self._cluster.done(number, self._workload.arrivals[index])
        self._answered.add(index)
        for waiting in self._next.pop(index, ()):
            self._arrive(waiting, now)

    def _start(self, number: int, now: float) -> None:
        worker = self._workers[number]
        index = worker.waiting.popleft()
        worker.is_busy = True
        arrival = self._workload.arrivals[index]
        self._cluster.started(number, arrival)
        served = self._serve(worker, arrival, now)
        self._count(number, served)
        self._push(now + served.seconds, _Kind.first_token, number, index)

    def _serve(self, worker: _Worker, arrival: Arrival, now: float) -> _Served:
        block, last = self._workload.block_tokens, arrival.num_tokens - 1  # the last token is always computed
        hit = min(worker.cache.depth(arrival.path) * block, last)
        tier, get_s = hit, 0.0
        if self._tier is not None:
            tier = max(hit, min(self._tier.depth(arrival.path, now) * block, last))
            get_s = self._costs.get_tokens_s(tier - hit) if tier > hit else 0.0
            if get_s > self._costs.prefill_s(hit, tier):
                tier, get_s = hit, 0.0
        seconds = get_s + self._costs.prefill_s(tier, arrival.num_tokens)
        seconds += self._costs.steps_s(arrival.num_tokens - tier, worker.num_answers)
        return _Served(hit, tier - hit, arrival.num_tokens - tier, seconds)

    def _count(self, number: int, served: _Served) -> None:
        self._hit += served.hit
        self._from_tier += served.tier
        self._computed += served.computed
        self._read += served.tier * self._costs.token_bytes
        self._busy[number] += served.seconds

    def _first_token(self, number: int, index: int, now: float) -> None:
        worker, arrival = self._workers[number], self._workload.arrivals[index]
        self._last = now
        self._ttft[index] = now - self._arrived_at[index]
        came, went = worker.cache.use(arrival.path)
        self._put(came, now)
        self._router.computed(number, index, came, went, now)
        worker.num_answers += 1
        self._push(now + self._costs.answer_s(arrival.num_output), _Kind.done, number, index)
        worker.is_busy = False
        if worker.waiting:
            self._start(number, now)

    def _put(self, came: list[int], now: float) -> None:
        if self._tier is None or not came:
            return
        num_tokens = len(came) * self._workload.block_tokens
        new = self._tier.put(came, now + self._costs.put_tokens_s(num_tokens))
        self._written += new * self._workload.block_tokens * self._costs.token_bytes

    def _push(self, at: float, kind: _Kind, number: int, index: int) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, kind, number, index))
