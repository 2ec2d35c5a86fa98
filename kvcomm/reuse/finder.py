"""Finding what can be moved into a prompt, and publishing what a request has computed for others to move.

A segment with a name is a slot: its text can be moved. One without is template text, which is always computed. Every
context that reads or writes a text leaves a rendition of it, a few of each text where they have read different things.
The one to move is that which has read most of what stands before the text in the target: what a source has not read
costs most, while it does no harm that it has read more. Among equals one comes first that is of the context which its
neighbor in the prompt is taken from (texts of one context fit each other, even where it is approximate), then an exact
one, one with less risk, the nearest by position, and the newest. A text that stands first is not moved from where it
stood behind others: the first text is read like no other, and computed once it is an exact prefix from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvcomm.align.edges import Edge, signatures
from kvcomm.align.moves import Move
from kvcomm.align.repeats import Surroundings
from kvcomm.align.slot_kinds import kind_of
from kvcomm.align.spans import place_of
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.plan import Part, Reason

MAX_RENDITIONS = 4
"""Of one text in one context signature, that have read different things."""


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
    """Moves out of, and renditions into, the store of renditions. Called under the engine's lock.

    Attributes:
        published: is told of every new rendition, if anybody wants to know.
    """

    def __init__(self, memory: Memory) -> None:
        self.published: Callable[[str, Segment, Rendition], None] | None = None
        self._memory = memory

    def find(
        self,
        namespace: str,
        segments: Sequence[Segment],
        num_exact: int,
        own: KVSequence,
        *,
        before_s: float = math.inf,
        max_risk: float = math.inf,
        is_use: bool = True,
    ) -> list[Move]:
        """What could be moved behind the first `num_exact` tokens; retains the pages of the sources.

        The last token of a prompt is never moved: its logits are needed. Nor is what lies in `own` pages already.

        Args:
            before_s: only renditions made before this moment, on the monotonic clock.
            max_risk: nats; only renditions of which no more is to be expected.
            is_use: count what is found as used now.
        """
        last = sum(len(segment.token_ids) for segment in segments) - 1
        moves: list[Move] = []
        neighbor: Rendition | None = None
        # From the end: the later a text stands, the fewer contexts have read all that stands before it.
        for each in reversed(list(occurrences(segments))):
            if each.segment.name is None or each.end <= num_exact:
                continue
            known = [found for found in self._renditions(namespace, each, own, before_s) if found.risk <= max_risk]
            neighbor = _best(each, known, neighbor)
            if neighbor is None:
                continue
            if is_use:
                self._memory.renditions.touch(namespace, neighbor)
            start, end = max(each.start, num_exact), min(each.start + neighbor.num_tokens, last)
            if start < end:
                moves.append(self._move(each, neighbor, start, end))
        return moves[::-1]

    def is_known(self, namespace: str, segment: Segment) -> bool:
        """Whether there is any rendition of a segment."""
        return bool(self._memory.renditions.renditions_of(namespace, segment))

    def is_displaced(self, namespace: str, segments: Sequence[Segment]) -> bool:
        """Whether the first text of a prompt is known, but only from where it stood behind others."""
        first = next((each for each in occurrences(segments) if each.segment.name is not None), None)
        known = () if first is None else self._memory.renditions.renditions_of(namespace, first.segment)
        return bool(known) and all(rendition.before for rendition in known)

    def publish(
        self, namespace: str, segments: Sequence[Segment], sequence: KVSequence, *, start: int, risk: float
    ) -> None:
        """Make the slots of a computed sequence from position `start` on available to other contexts."""
        for each in occurrences(segments):
            num_tokens = min(each.end, sequence.num_computed) - each.start
            if each.segment.name is None or each.start < start or num_tokens <= 0:
                continue
            is_exact = each.start + num_tokens <= sequence.num_exact
            if self._adds_something(namespace, each, is_exact):
                self._put(namespace, each, sequence, num_tokens, risk=0.0 if is_exact else risk, is_exact=is_exact)

    def replace(self, namespace: str, segments: Sequence[Segment], sequence: KVSequence) -> None:
        """All KV of a sequence is exact now: its exact renditions take the place of its approximate ones."""
        for segment in {each for each in segments if each.name is not None}:
            for rendition in self._memory.renditions.renditions_of(namespace, segment):
                if rendition.context is sequence.identity and rendition.fidelity is Fidelity.APPROXIMATE:
                    self._memory.renditions.drop(namespace, rendition)
        self.publish(namespace, segments, sequence, start=0, risk=0.0)

    def _adds_something(self, namespace: str, each: Occurrence, is_exact: bool) -> bool:
        """Whether no rendition that is as good has read all of what this one has, and there are not too many."""
        alike = [
            rendition
            for rendition in self._memory.renditions.renditions_of(namespace, each.segment)
            if rendition.signature == each.signature and (rendition.fidelity is Fidelity.EXACT or not is_exact)
        ]
        read = _texts(each.before)
        return len(alike) < MAX_RENDITIONS and not any(read <= _texts(rendition.before) for rendition in alike)

    def _put(
        self,
        namespace: str,
        each: Occurrence,
        sequence: KVSequence,
        num_tokens: int,
        *,
        risk: float,
        is_exact: bool,
    ) -> None:
        page_size = self._memory.pool.page_size
        first = each.start // page_size
        rendition = self._memory.renditions.put(
            namespace,
            each.segment,
            signature=each.signature,
            start=each.start,
            pages=sequence.pages[first : -(-(each.start + num_tokens) // page_size)],
            offset=each.start - first * page_size,
            fidelity=Fidelity.EXACT if is_exact else Fidelity.APPROXIMATE,
            num_tokens=num_tokens,
            risk=risk,
            slot=each.segment.name or "",
            before=each.before,
            context=sequence.identity,
        )
        if rendition is not None and self.published is not None:
            self.published(namespace, each.segment, rendition)

    def release(self, moves: Sequence[Move]) -> None:
        """Give back the pages of sources."""
        for move in moves:
            self._memory.pool.release(move.source_pages)

    def _renditions(self, namespace: str, each: Occurrence, own: KVSequence, before_s: float) -> list[Rendition]:
        return [
            rendition
            for rendition in self._memory.renditions.renditions_of(namespace, each.segment)
            if rendition.created_s < before_s and not self._is_own(rendition, each, own)
        ]

    def _is_own(self, rendition: Rendition, each: Occurrence, own: KVSequence) -> bool:
        """Whether a prompt has this KV already; its first page may be shared for what stands before the text only."""
        first = each.start // self._memory.pool.page_size
        return own.num_computed > each.start and int(rendition.pages[0]) == int(own.pages[first])

    def _move(self, each: Occurrence, rendition: Rendition, start: int, end: int) -> Move:
        pool, index = self._memory.pool, start - each.start
        pages = rendition.pages.copy()
        pool.retain(pages)
        first, position = rendition.offset + index, rendition.start + index
        source = place_of(pool, pages, first, end - start, position=position, owner=rendition.identity)
        edge, is_exact = _edge(rendition, each), rendition.fidelity is Fidelity.EXACT
        return Move(edge, start, end, index, source, pages, _around(rendition, each), rendition.risk, is_exact)


def _best(each: Occurrence, known: Sequence[Rendition], neighbor: Rendition | None) -> Rendition | None:
    """See the top of this file; `neighbor`: what the slot behind is taken from."""
    wanted = _texts(each.before)

    def rank(rendition: Rendition) -> tuple[int, bool, bool, float, int, float]:
        num_unread = len(wanted - _texts(rendition.before))
        is_apart = neighbor is None or rendition.context is not neighbor.context
        is_approximate = rendition.fidelity is not Fidelity.EXACT
        way = abs(rendition.start - each.start)
        return num_unread, is_apart, is_approximate, rendition.risk, way, -rendition.created_s

    return min((rendition for rendition in known if not _is_displaced(rendition, each)), key=rank, default=None)


def _is_displaced(rendition: Rendition, each: Occurrence) -> bool:
    return bool(rendition.before) and not each.before


def _texts(segments: Iterable[Segment]) -> frozenset[tuple[int, ...]]:
    return frozenset(segment.token_ids for segment in segments)


def _edge(rendition: Rendition, each: Occurrence) -> Edge:
    assert each.segment.name is not None
    return Edge(rendition.signature, each.signature, kind_of(each.segment.name), kind_of(rendition.slot))


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
    is_displaced: bool,
    back_until: int = 0,
) -> list[Part]:
    """Everything behind the exact prefix: what is moved, glue, and slots that are computed for the reason `unmoved`.

    Args:
        moved: `[start, end)` of what is moved, ascending.
        otherwise: why template text before the first move is computed.
        is_displaced: the first slot is computed for a reason of its own.
        back_until: so are slots that begin before this position: text was moved there before.
    """
    parts: list[Part] = []
    for each in occurrences(segments):
        at = max(each.start, num_exact)
        is_behind = any(start < each.end for start, _ in moved)
        # Of a text that is cached but for its last token that one is computed anyway: for its logits, or as the last
        # one that a context has drawn.
        is_all_but_read = each.start < at == each.end - 1
        if each.segment.name is None or is_all_but_read:
            reason = Reason.GLUE if is_behind else otherwise
        else:
            reason = Reason.DISPLACED if is_displaced and not each.before else unmoved
            reason = Reason.COMES_BACK if each.start < back_until else reason
        for start, end in moved:
            if start >= at and end <= each.end:
                parts += [Part(at, start, reason), Part(start, end, None)]
                at = end
        if at < each.end:
            parts.append(Part(at, each.end, reason))
    return [part for part in parts if part.start < part.end]
