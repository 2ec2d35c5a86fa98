"""What arrives at a cluster: the requests of a trace, as paths in the trie of all prompts.

Two prompts share KV exactly as far as their paths agree, so a block is known by its node. Blocks smaller than
`BLOCK_TOKENS` are taken together, and what is left of a prompt behind its last whole block is never shared.

A large cluster needs more users than one trace has: `copies` are independent populations whose prompts share nothing,
each with its time turned by a random part of the whole. Sessions without a common clock start spread over the trace.
Time is scaled as a whole later, so that every router meets the same arrivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eval.optimum import trie_paths
from kvcomm.lab.load.trace_file import IdArray, Request, Trace

BLOCK_TOKENS = 512


class Arrival(NamedTuple):
    """One request.

    Attributes:
        at: when it arrives, in the trace's own seconds.
        path: nodes of its whole blocks, from the first.
        num_tokens: of its prompt, at least one.
        num_output: tokens of its answer, at least one.
    """

    at: float
    path: IdArray
    num_tokens: int
    num_output: int


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

    @property
    def distinct_tokens(self) -> int:
        """Tokens that even one cache without bounds would have to compute."""
        in_blocks = sum(arrival.path.size for arrival in self.arrivals) * self.block_tokens
        return self.num_tokens - in_blocks + self.num_nodes * self.block_tokens


def make_workload(trace: Trace, *, copies: int = 1, seed: int = 0) -> Workload:
    """The workload of a trace; the same for the same seed."""
    generator = np.random.default_rng(seed)
    requests, block_tokens = _whole_blocks(trace)
    paths, num_nodes = trie_paths(requests)
    num_tokens = [max(request.blocks.size * trace.block_size, 1) for request in trace.requests]
    span, times = _times(trace, generator)
    arrivals = []
    for copy in range(copies):
        turned = (times + (generator.uniform(0, span) if copy else 0.0)) % span
        arrivals += [
            Arrival(at, path + copy * num_nodes, tokens, request.num_output or 1)
            for at, path, tokens, request in zip(turned.tolist(), paths, num_tokens, requests, strict=True)
        ]
    arrivals.sort(key=lambda arrival: arrival.at)
    return Workload(tuple(arrivals), block_tokens, copies * num_nodes, span)


def _whole_blocks(trace: Trace) -> tuple[list[Request], int]:
    """Requests with blocks of at least `BLOCK_TOKENS`. An id stands for all before it, so the last of each group does
    for the group."""
    group = max(1, BLOCK_TOKENS // trace.block_size)
    return [request._replace(blocks=request.blocks[group - 1 :: group]) for request in trace.requests], (
        group * trace.block_size
    )


def _times(trace: Trace, generator: np.random.Generator) -> tuple[float, npt.NDArray[np.float64]]:
    """Length of the trace and times within it. Sessions wrap around, so that load is even from start to end."""
    times = np.array([request.at_s for request in trace.requests])
    sessions = np.array([request.session for request in trace.requests])
    span = max(float(times.max() - times.min()), 1e-9) * (1 + 1 / max(len(times), 1))
    if trace.format == "agentic":
        span = max(_session_spans(times, sessions)) * 1.01 + 1e-9
        times = times + generator.uniform(0, span, trace.num_sessions)[_numbered(sessions)]
    return span, (times - times.min()) % span


def _session_spans(times: npt.NDArray[np.float64], sessions: npt.NDArray[np.int64]) -> Sequence[float]:
    return [float(np.ptp(times[sessions == session])) for session in np.unique(sessions)]


def _numbered(sessions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.unique(sessions, return_inverse=True)[1]
