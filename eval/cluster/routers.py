"""How requests find a worker: what others publish, and our own policy.

Every router sees what a router in front of real workers could see: its own requests in flight, and where it says so the
contents of the caches. The published ones are written from their documentation and sources:

- `PrefixHash`: consistent hashing with bounded loads over the beginning of the prompt, as KubeAI's PrefixHash does it:
  256 points a worker, at most 1.25 times the mean number of requests in flight, the next worker on the ring otherwise.
  KubeAI hashes the first user message; a trace does not say where that begins, so the first `HASH_BLOCKS` blocks are
  hashed, and not the system prompt alone, which whole traces share.
- `PrefixTrie`: the production stack of vLLM: the workers that were sent the longest beginning of this prompt, one of
  them at random; below a least length the least busy one. It knows no load and no eviction.
- `PrefixScore`: the scorers of llm-d's inference scheduler with exact indices of the caches: 3 parts of prefix, 2 of
  queue, 2 of memory, the highest sum; ties at random. Its index of the caches is never late here, which favours it.
"""

from __future__ import annotations

import bisect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from eval.cluster.workload import Arrival
from kvcomm.integrations.ray import Policy, PromptPrefix, Wanted, candidates, rank, rendezvous

HASH_BLOCKS = 2
RING_POINTS = 256
BOUND = 1.25
LEAST_MATCH_BLOCKS = 2
SCORE_WEIGHTS = (3.0, 2.0, 2.0)
"""Of prefix, queue and memory."""

MAX_RUNS = 64
"""Keys of a prompt that our router looks up and a worker has to report."""


class Cluster:
    """What can be seen of the workers from outside; arrays are [num_workers]."""

    def __init__(self, num_workers: int, *, block_tokens: int, capacity_tokens: int) -> None:
        self.num_workers = num_workers
        self.block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens
        self.in_flight = np.zeros(num_workers, dtype=np.int64)  # requests sent and not answered
        self.waiting = np.zeros(num_workers, dtype=np.int64)  # of these, not begun
        self.active_tokens = np.zeros(num_workers, dtype=np.int64)  # KV of requests begun and not answered

    def sent(self, worker: int) -> None:
        """A request was sent."""
        self.in_flight[worker] += 1
        self.waiting[worker] += 1

    def started(self, worker: int, arrival: Arrival) -> None:
        """Its prompt's turn has come."""
        self.waiting[worker] -= 1
        self.active_tokens[worker] += arrival.num_tokens

    def done(self, worker: int, arrival: Arrival) -> None:
        """It is answered."""
        self.in_flight[worker] -= 1
        self.active_tokens[worker] -= arrival.num_tokens


class Router(Protocol):
    """Chooses workers; told what happens afterwards."""

    def __init__(self, cluster: Cluster, generator: np.random.Generator) -> None:
        self.cluster, self.generator = cluster, generator

    @abstractmethod
    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        """A worker for a request, of whose path the tier has the first `tier_blocks`."""

    def sent(self, worker: int, index: int, arrival: Arrival) -> None:  # most need not know
        """The request with this index was sent to a worker."""

    def computed(self, worker: int, index: int, came: list[int], went: list[int], now: float) -> None:
        """Its first token is there; blocks came to the worker's cache and went from it."""


class Random(Router):
    """Any worker."""

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        return int(self.generator.integers(self.cluster.num_workers))


class RoundRobin(Router):
    """One worker after the other."""

    _next = -1

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        self._next = (self._next + 1) % self.cluster.num_workers
        return self._next


class LeastLoaded(Router):
    """The fewest requests in flight; ties at random."""

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        return self._any_least(self.cluster.in_flight)

    def _any_least(self, values: npt.NDArray[np.int64]) -> int:
        return int(self.generator.choice(np.flatnonzero(values == values.min())))


class PrefixHash(Router):
    """Consistent hashing with bounded loads over the first blocks."""

    def __init__(self, cluster: Cluster, generator: np.random.Generator) -> None:
        super().__init__(cluster, generator)
        points = sorted(
            (rendezvous(str(point), str(worker)), worker)
            for worker in range(cluster.num_workers)
            for point in range(RING_POINTS)
        )
        self._points = [point for point, _ in points]
        self._workers = [worker for _, worker in points]
        self._num_unhashed = 0

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        bound = math.ceil(BOUND * (int(self.cluster.in_flight.sum()) + 1) / self.cluster.num_workers)
        at = bisect.bisect(self._points, rendezvous(self._key(arrival), ""))
        while True:
            worker = self._workers[at % len(self._workers)]
            if self.cluster.in_flight[worker] < bound:
                return worker
            at += 1

    def _key(self, arrival: Arrival) -> str:
        if arrival.path.size:
            return str(arrival.path[min(HASH_BLOCKS, arrival.path.size) - 1])
        self._num_unhashed += 1
        return f"short {self._num_unhashed}"


class PrefixTrie(LeastLoaded):
    """The longest beginning that was sent anywhere, no matter how busy."""

    def __init__(self, cluster: Cluster, generator: np.random.Generator) -> None:
        super().__init__(cluster, generator)
        self._sent: dict[int, list[int]] = {}  # node -> workers

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        nodes = arrival.path.tolist()
        found = next((at for at in range(len(nodes), 0, -1) if nodes[at - 1] in self._sent), 0)
        if found < min(LEAST_MATCH_BLOCKS, max(len(nodes), 1)):
            return super().choose(arrival, now, tier_blocks)
        return int(self.generator.choice(self._sent[nodes[found - 1]]))

    def sent(self, worker: int, index: int, arrival: Arrival) -> None:
        for node in arrival.path.tolist():
            known = self._sent.setdefault(node, [])
            if worker not in known:
                known.append(worker)


class PrefixScore(Router):
    """Weighted scores of prefix, queue and memory."""

    def __init__(self, cluster: Cluster, generator: np.random.Generator) -> None:
        super().__init__(cluster, generator)
        self._holders: dict[int, set[int]] = {}

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        prefix, queue, memory = SCORE_WEIGHTS
        waiting = self.cluster.waiting
        spread = int(waiting.max() - waiting.min())
        scores = prefix * self._depths(arrival) / max(arrival.path.size, 1)
        scores += queue * ((waiting.max() - waiting) / spread if spread else np.ones(len(waiting)))
        scores += memory * (1 - np.minimum(self.cluster.active_tokens / self.cluster.capacity_tokens, 1))
        return int(self.generator.choice(np.flatnonzero(scores == scores.max())))

    def _depths(self, arrival: Arrival) -> npt.NDArray[np.float64]:
        depths = np.zeros(self.cluster.num_workers)
        for depth, node in enumerate(arrival.path.tolist(), start=1):
            holders = self._holders.get(node)
            if not holders:
                break
            depths[list(holders)] = depth
        return depths

    def computed(self, worker: int, index: int, came: list[int], went: list[int], now: float) -> None:
        for node in came:
            self._holders.setdefault(node, set()).add(worker)
        for node in went:
            self._holders[node].discard(worker)


class Ours(Router):
    """`kvcomm.integrations.ray.routing`, with what its caller knows: where it sent what, and late news of evictions.

    Loads are the tokens that requests without a first token were expected to compute.
    """

    REPORT_S = 10.0
    """Until a worker's report of what it dropped has come."""

    def __init__(self, cluster: Cluster, generator: np.random.Generator, policy: Policy | None = None) -> None:
        super().__init__(cluster, generator)
        self._policy = policy or Policy()
        self._names = [f"worker-{number}" for number in range(cluster.num_workers)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._holders: dict[str, set[str]] = {}
        self._loads = dict.fromkeys(self._names, 0.0)
        self._expected: dict[int, float] = {}  # request -> tokens
        self._reports: list[tuple[float, int, list[int]]] = []
        self._num_read = 0
        self._chosen: Wanted = Wanted(1)

    def choose(self, arrival: Arrival, now: float, tier_blocks: int) -> int:
        self._read_reports(now)
        self._chosen = wanted = self._wanted(arrival, tier_blocks)
        least = min(self._loads.values())
        near = {name for name, load in self._loads.items() if load <= least + self._policy.slack}
        few = candidates(wanted, self._holders, self._loads, near)
        return self._numbers[rank(wanted, self._holders, few, policy=self._policy)[0]]

    def sent(self, worker: int, index: int, arrival: Arrival) -> None:
        wanted, name = self._chosen, self._names[worker]
        held = max((run.end for run in wanted.runs if name in self._holders.get(run.key, ())), default=0)
        beyond = max(wanted.tier_tokens - held, 0)
        expected = wanted.num_tokens - held - beyond * (1 - self._policy.tier_cost)
        self._expected[index] = expected
        self._loads[name] += expected
        for run in wanted.runs:
            self._holders.setdefault(run.key, set()).add(name)

    def computed(self, worker: int, index: int, came: list[int], went: list[int], now: float) -> None:
        self._loads[self._names[worker]] -= self._expected.pop(index)
        if went:
            self._reports.append((now + self.REPORT_S, worker, went))

    def _wanted(self, arrival: Arrival, tier_blocks: int) -> Wanted:
        block, nodes = self.cluster.block_tokens, arrival.path.tolist()
        step = 1 if len(nodes) <= MAX_RUNS else 4
        runs = tuple(PromptPrefix(str(nodes[at - 1]), at * block) for at in range(step, len(nodes) + 1, step))
        return Wanted(arrival.num_tokens, runs, tier_tokens=tier_blocks * block)

    def _read_reports(self, now: float) -> None:
        while self._num_read < len(self._reports) and self._reports[self._num_read][0] <= now:
            _, worker, went = self._reports[self._num_read]
            for node in went:
                self._holders.get(str(node), set()).discard(self._names[worker])
            self._num_read += 1


MakeRouter = Callable[[Cluster, np.random.Generator], Router]

ROUTERS: Mapping[str, MakeRouter] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "prefix_hash": PrefixHash,
    "prefix_trie": PrefixTrie,
    "prefix_score": PrefixScore,
    "ours": Ours,
}
