"""The segment tree: which chains of segments are known, and how much of each is cached.

A view: it owns only the chains it was told of, bounded in number, and asks the radix tree for everything
else, so it can never disagree with the cache. The node reached after segments A, B, D stands for the token
path A + B + D. Looking at it counts as no use of the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvcomm.memory.node import TokenIds
from kvcomm.memory.segments import Segment
from kvcomm.memory.tree import RadixTree

Digests = tuple[str, ...]


class SegmentNode(NamedTuple):
    """One segment behind a given chain of others, `depth` segments from the start (1 = first)."""

    depth: int
    digest: str
    name: str | None
    num_tokens: int
    cached_tokens: int  # leading tokens of this segment whose KV is cached behind this very chain


class ChainCoverage(NamedTuple):
    """How much of a chain is cached: tokens in all, segments in full, and tokens of each segment."""

    num_tokens: int
    num_segments: int
    by_segment: tuple[int, ...]


MAX_TOKENS = 2**20
"""Of all chains together; about 40 MB. A chain outlives its context, and so its KV and whatever bounds that."""


class SegmentTreeView:
    """Chains of segments recorded when contexts are made.

    The oldest is forgotten of more than `max_chains` in one namespace; and of more than `max_tokens` in all, the oldest
    of the namespace that has the most: nobody's chains go for another's.
    """

    def __init__(self, tree: RadixTree, *, max_chains: int = 1024, max_tokens: int = MAX_TOKENS) -> None:
        self._tree = tree
        self._max_chains = max_chains
        self._max_tokens = max_tokens
        self._num_tokens: Counter[str] = Counter()
        self._chains: dict[str, dict[Digests, tuple[Segment, ...]]] = {}

    def record(self, namespace: str, chain: Sequence[Segment]) -> None:
        """Make `chain` known, or young again."""
        if not chain:
            return
        chains = self._chains.setdefault(namespace, {})
        digests = tuple(segment.digest(namespace) for segment in chain)
        self._num_tokens[namespace] += _length(chain) - _length(chains.pop(digests, ()))
        chains[digests] = tuple(chain)
        if len(chains) > self._max_chains:
            self._forget_oldest(namespace)
        while self._num_tokens.total() > self._max_tokens:
            self._forget_oldest(max(self._num_tokens, key=self._num_tokens.__getitem__))

    def forget(self, namespace: str) -> None:
        """Drop every known chain of `namespace`; the cache stays as it is."""
        self._chains.pop(namespace, None)
        self._num_tokens.pop(namespace, None)

    def _forget_oldest(self, namespace: str) -> None:
        chains = self._chains[namespace]
        self._num_tokens[namespace] -= _length(chains.pop(next(iter(chains))))
        if not chains:
            self.forget(namespace)

    def coverage(self, namespace: str, chain: Sequence[Segment]) -> ChainCoverage:
        """How much of `chain`, known or not, is cached as one token path."""
        cached = self._tree.peek(namespace, token_path(chain))
        by_segment = _spread(cached, chain)
        full = sum(tokens == len(segment.token_ids) for tokens, segment in zip(by_segment, chain, strict=True))
        return ChainCoverage(cached, full, by_segment)

    def walk(self, namespace: str) -> Iterator[SegmentNode]:
        """All known chains as one tree: parents before children, every shared beginning once."""
        seen: set[Digests] = set()
        for digests, chain in sorted(self._chains.get(namespace, {}).items()):
            by_segment = self.coverage(namespace, chain).by_segment
            for depth, segment in enumerate(chain, start=1):
                if digests[:depth] not in seen:
                    seen.add(digests[:depth])
                    tokens = by_segment[depth - 1]
                    yield SegmentNode(depth, digests[depth - 1], segment.name, len(segment.token_ids), tokens)

    def render(self, namespace: str) -> str:
        """The tree as text, one segment a line: name or digest, cached tokens / tokens."""
        return "\n".join(
            f"{'  ' * (node.depth - 1)}{node.name or node.digest[:12]}  {node.cached_tokens}/{node.num_tokens}"
            for node in self.walk(namespace)
        )


def _length(chain: Sequence[Segment]) -> int:
    return sum(len(segment.token_ids) for segment in chain)


def token_path(chain: Sequence[Segment]) -> TokenIds:
    """The tokens of all segments, one after the other."""
    return np.array([token for segment in chain for token in segment.token_ids], dtype=np.int32)


def _spread(num_tokens: int, chain: Sequence[Segment]) -> tuple[int, ...]:
    """Distribute the first `num_tokens` of the path over the segments they belong to."""
    by_segment = []
    for segment in chain:
        by_segment.append(min(num_tokens, len(segment.token_ids)))
        num_tokens -= by_segment[-1]
    return tuple(by_segment)
