"""Finding what can be moved into a prompt, and publishing what a request has computed for others to move.

A segment with a name is a slot: its text can be moved. One without is template text, which is always computed. Every
context that reads or writes a text leaves a rendition of it. The one to move is that of the edge which could be taken
most often, so that edges stay the same from request to request: agents who agree write one text in several contexts,
but what an agent has written himself is there when they do not agree, too. Among equals it is the edge about which most
is known, then the first reader's (or the producer's).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvcomm.align.edges import Edge, signatures
from kvcomm.align.moves import Move
from kvcomm.align.repeats import Surroundings
from kvcomm.align.spans import place_of
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.segments import Rendition, Segment
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.reuse.plan import Part, Reason

MAX_COUNTED_EDGES = 10_000
"""Edges of which it is kept how often they could be taken; beyond, those are forgotten that were seen longest ago."""


class Occurrence(NamedTuple):
    """A segment at its place in a prompt; `before`: the slots that stand before it."""

    segment: Segment
    signature: str
    start: int
    before: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """One past its last position."""
        return self.start + len(self.segment.token_ids)


def occurrences(segments: Sequence[Segment]) -> Iterator[Occurrence]:
    """Every segment of a prompt, in order."""
    start = 0
    before: tuple[Segment, ...] = ()
    for segment, signature in zip(segments, signatures(segments), strict=True):
        yield Occurrence(segment, signature, start, before)
        start += len(segment.token_ids)
        if segment.name is not None:
            before = (*before, segment)


class MoveFinder:
    """Moves out of, and renditions into, the segment store. Called under the engine's lock."""

    def __init__(self, memory: Memory, evidence: Callable[[str, Edge], int]) -> None:
        """Args:
        evidence: how much is known about an edge of a namespace; only compared.
        """
        self._memory = memory
        self._evidence = evidence
        self._times_seen: OrderedDict[tuple[str, Edge], int] = OrderedDict()

    def find(
        self,
        namespace: str,
        segments: Sequence[Segment],
        num_exact: int,
        own: KVSequence,
        *,
        before_s: float = math.inf,
        is_use: bool = True,
    ) -> list[Move]:
        """What could be moved behind the first `num_exact` tokens; retains the pages of the sources.

        The last token of a prompt is never moved: its logits are needed. Nor is what lies in `own` pages already.

        Args:
            before_s: only renditions made before this moment, on the monotonic clock.
            is_use: count what is found as used now, and the edges it could be taken from as seen.
        """
        last = sum(len(segment.token_ids) for segment in segments) - 1
        moves = []
        for each in occurrences(segments):
            if each.segment.name is None or each.end <= num_exact:
                continue
            known = self._renditions(namespace, each, own, before_s)
            if not known:
                continue
            if is_use:
                self._count(namespace, dict.fromkeys(_edge(rendition, each) for rendition in known))
            rendition = self._best(namespace, each, known)
            if is_use:
                self._memory.segments.touch(namespace, rendition)
            start, end = max(each.start, num_exact), min(each.start + rendition.num_tokens, last)
            if start < end:
                moves.append(self._move(each, rendition, start, end))
        return moves

    def is_known(self, namespace: str, segment: Segment) -> bool:
        """Whether there is any rendition of a segment."""
        return bool(self._memory.segments.renditions_of(namespace, segment))

    def publish(
        self, namespace: str, segments: Sequence[Segment], sequence: KVSequence, *, start: int, risk: float
    ) -> None:
        """Make the slots of a computed sequence from position `start` on available to other contexts."""
        store, page_size = self._memory.segments, self._memory.pool.page_size
        for each in occurrences(segments):
            num_tokens = min(each.end, sequence.num_computed) - each.start
            if each.segment.name is None or each.start < start or num_tokens <= 0:
                continue
            is_exact = each.start + num_tokens <= sequence.num_exact
            if store.get(namespace, each.segment, signature=each.signature, allow_approximate=not is_exact):
                continue
            first = each.start // page_size
            pages = sequence.pages[first : -(-(each.start + num_tokens) // page_size)]
            store.put(
                namespace,
                each.segment,
                signature=each.signature,
                start=each.start,
                pages=pages,
                offset=each.start - first * page_size,
                fidelity=Fidelity.EXACT if is_exact else Fidelity.APPROXIMATE,
                num_tokens=num_tokens,
                risk=0.0 if is_exact else risk,
                slot=each.segment.name,
                before=each.before,
            )

    def release(self, moves: Sequence[Move]) -> None:
        """Give back the pages of sources."""
        for move in moves:
            self._memory.pool.release(move.source_pages)

    def _renditions(self, namespace: str, each: Occurrence, own: KVSequence, before_s: float) -> list[Rendition]:
        return [
            rendition
            for rendition in self._memory.segments.renditions_of(namespace, each.segment)
            if rendition.created_s < before_s and not self._is_own(rendition, each, own)
        ]

    def _best(self, namespace: str, each: Occurrence, known: Sequence[Rendition]) -> Rendition:
        def rank(rendition: Rendition) -> tuple[bool, int, int, float]:
            edge = _edge(rendition, each)
            times_seen = self._times_seen.get((namespace, edge), 0)
            is_approximate = rendition.fidelity is not Fidelity.EXACT
            return is_approximate, -times_seen, -self._evidence(namespace, edge), rendition.created_s

        return min(known, key=rank)

    def _count(self, namespace: str, edges: Iterable[Edge]) -> None:
        for edge in edges:
            self._times_seen[namespace, edge] = self._times_seen.pop((namespace, edge), 0) + 1
        while len(self._times_seen) > MAX_COUNTED_EDGES:
            self._times_seen.popitem(last=False)

    def _is_own(self, rendition: Rendition, each: Occurrence, own: KVSequence) -> bool:
        first = each.start // self._memory.pool.page_size
        return first < own.num_pages and int(rendition.pages[0]) == int(own.pages[first])

    def _move(self, each: Occurrence, rendition: Rendition, start: int, end: int) -> Move:
        pool, index = self._memory.pool, start - each.start
        pages = rendition.pages.copy()
        pool.retain(pages)
        first, position = rendition.offset + index, rendition.start + index
        source = place_of(pool, pages, first, end - start, position=position, owner=rendition.identity)
        edge, is_exact = _edge(rendition, each), rendition.fidelity is Fidelity.EXACT
        return Move(edge, start, end, index, source, pages, _around(rendition, each), rendition.risk, is_exact)


def _edge(rendition: Rendition, each: Occurrence) -> Edge:
    assert each.segment.name is not None
    return Edge(rendition.signature, each.signature, each.segment.name, rendition.slot)


def _around(rendition: Rendition, each: Occurrence) -> Surroundings:
    seen = [segment.token_ids for segment in rendition.before]
    unseen = [segment.token_ids for segment in each.before if segment.token_ids not in seen]
    return Surroundings(each.segment.token_ids, seen, unseen)


def parts_of(
    segments: Sequence[Segment],
    num_exact: int,
    moved: Sequence[tuple[int, int]],
    *,
    otherwise: Reason,
    unmoved: Reason,
) -> list[Part]:
    """Everything behind the exact prefix: what is moved, glue, and slots that are computed for the reason `unmoved`.

    Args:
        moved: `[start, end)` of what is moved, ascending.
        otherwise: why template text before the first move is computed.
    """
    parts: list[Part] = []
    for each in occurrences(segments):
        at = max(each.start, num_exact)
        is_behind = any(start < each.end for start, _ in moved)
        static = Reason.GLUE if is_behind else otherwise
        # A slot that the exact prefix reaches into has a source of its own, which ends there.
        reason = static if each.segment.name is None or at > each.start else unmoved
        for start, end in moved:
            if start >= at and end <= each.end:
                parts += [Part(at, start, reason), Part(start, end, None)]
                at = end
        if at < each.end:
            parts.append(Part(at, each.end, reason))
    return [part for part in parts if part.start < part.end]
