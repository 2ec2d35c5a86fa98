"""What arrives at a cluster: the requests of a trace, as paths in the trie of all prompts.

Two prompts share KV exactly as far as their paths agree, so a block is known by its node. Blocks smaller than
`BLOCK_TOKENS` are taken together, and what is left of a prompt behind its last whole block is never shared.

A large cluster needs more users than one trace has: `copies` are independent populations whose prompts share nothing,
each with its time turned by a random part of the whole. Of sessions without a common clock the first `SESSION_S` are
taken, spread over as long; a request of a session waits for the answer to the one before it, because an agent cannot
ask earlier. Time is scaled as a whole later, the same for every router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eval.optimum import trie_paths
from kvcomm.lab.load.trace_file import IdArray, Trace, TraceRequest

BLOCK_TOKENS = 512
AGENTIC = "agentic"
"""A format whose sessions have no common clock."""

SESSION_S = 3600.0
"""Of each such session: so many are under way at any time that a cluster has something to do."""


class Arrival(NamedTuple):
    """One request.

    Attributes:
        at: when it arrives, in the trace's own seconds; not before the request `after` is answered, if there is one.
        path: nodes of its whole blocks, from the first.
        num_tokens: of its prompt, at least one.
        num_output: tokens of its answer, at least one.
    """

    at: float
    path: IdArray
    num_tokens: int
    num_output: int
    after: int | None = None  # which of the workload's arrivals


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival.

    Attributes:
        block_tokens: tokens of a block.
        num_nodes: nodes are numbered from 0 to this.
        span: of all arrivals, in the trace's seconds.
    """

    arrivals: tuple[Arrival, ...]
    block_tokens: int
    num_nodes: int
    span: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(arrival.num_tokens for arrival in self.arrivals)


def make_workload(trace: Trace, *, copies: int = 1, seed: int = 0) -> Workload:
    """The workload of a trace; the same for the same seed."""
    generator = np.random.default_rng(seed)
    trace = beginnings(trace)
    requests, block_tokens = _whole_blocks(trace)
    paths, num_nodes = trie_paths(requests)
    num_tokens = [max(request.blocks.size * trace.block_size, 1) for request in trace.requests]
    span, times = _times(trace, generator)
    arrivals: list[Arrival] = []
    for copy in range(copies):
        shifted = times + (generator.uniform(0, span) if copy else 0.0)
        before = _before(trace, shifted // span) if trace.format == AGENTIC else [None] * len(requests)
        arrivals += [
            Arrival(at, path + copy * num_nodes, tokens, request.num_output or 1, after)
            for at, path, tokens, request, after in zip(
                (shifted % span).tolist(), paths, num_tokens, requests, _moved(before, len(arrivals)), strict=True
            )
        ]
    return Workload(_in_order(arrivals), block_tokens, copies * num_nodes, span)


def _before(trace: Trace, laps: npt.NDArray[np.float64]) -> list[int | None]:
    """For each request the one before it in its session, but for one that has wrapped around."""
    latest: dict[tuple[int, float], int] = {}
    before: list[int | None] = []
    for index, (request, lap) in enumerate(zip(trace.requests, laps.tolist(), strict=True)):
        before.append(latest.get((request.session, lap)))
        latest[request.session, lap] = index
    return before


def _moved(indices: Sequence[int | None], by: int) -> list[int | None]:
    return [None if index is None else index + by for index in indices]


def _in_order(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    """Sorted by time; `after` is renumbered."""
    order = sorted(range(len(arrivals)), key=lambda index: arrivals[index].at)
    places = {index: place for place, index in enumerate(order)}
    return tuple(
        arrivals[index]._replace(after=None if (after := arrivals[index].after) is None else places[after])
        for index in order
    )


def _whole_blocks(trace: Trace) -> tuple[list[TraceRequest], int]:
    """Requests with blocks of at least `BLOCK_TOKENS`. An id stands for all before it, so the last of each group does
    for the group."""
    group = max(1, BLOCK_TOKENS // trace.block_size)
    return [request._replace(blocks=request.blocks[group - 1 :: group]) for request in trace.requests], (
        group * trace.block_size
    )


def _times(trace: Trace, generator: np.random.Generator) -> tuple[float, npt.NDArray[np.float64]]:
    """Length of the trace, and times; beyond the length they wrap around, so that load is even from start to end."""
    times = np.array([request.at_s for request in trace.requests])
    sessions = np.array([request.session for request in trace.requests])
    span = max(float(times.max() - times.min()), 1e-9) * (1 + 1 / max(len(times), 1))
    if trace.format == AGENTIC:
        starts = generator.uniform(0, SESSION_S, len(np.unique(sessions)))
        return SESSION_S, times + starts[np.unique(sessions, return_inverse=True)[1]]
    return span, times - times.min()


def beginnings(trace: Trace) -> Trace:
    """Of sessions without a common clock the first `SESSION_S`, each from its own second 0; another trace as it is."""
    if trace.format != AGENTIC:
        return trace
    starts: dict[int, float] = {}
    for request in trace.requests:  # in the order of time
        starts.setdefault(request.session, request.at_s)
    moved = (request._replace(at_s=request.at_s - starts[request.session]) for request in trace.requests)
    return replace(trace, requests=tuple(request for request in moved if request.at_s < SESSION_S))
