"""What is known of a reader, in numbers: what it has, what is missing for the next level, what it would be served with.

Looking changes nothing: nobody becomes known by being asked after, and nothing counts as used. A reader that has never
been seen stands where the pool and the prior put it. Called under the engine's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import SourcesRead, pairs_needed
from kvcomm.align.edges import Edge
from kvcomm.align.estimators import TokenEstimator
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level, Standing
from kvcomm.plain import Plain
from kvcomm.reuse.decision import Acceptance, decide
from kvcomm.reuse.parts import ReuseParts
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy

ANY_EDGE = Edge("some source", "some target", "", "")
"""Stands for the edges of a reader of which none is known: between different contexts, and without anchors."""
NUM_DIGITS = 12
"""Of a reader's digest, shown."""


@dataclass(frozen=True)
class LevelStatus(Plain):
    """One level and one ladder, as far as a reader is concerned.

    Attributes:
        estimator: of the ladder.
        num_pairs: there are; at pool and prior of the kind that the reader's sources are, see `levels.kinds_at`.
        num_needed: from which on the level may decide, if none of them breaks the bound.
        num_settled: from which on it decides although other levels have more.
        is_barred: audits have shown that it does not hold, for this reader or at all.
        working_delta: by which rungs are chosen now, see `align.watch`.
        num_audits, num_violations: of requests that the level decided about; for pool and prior, of all readers.
    """

    level: Level
    estimator: str
    num_pairs: int
    num_needed: int
    num_settled: int
    is_barred: bool
    working_delta: float
    num_audits: int
    num_violations: int

    @property
    def num_missing(self) -> int:
        """Pairs until it may decide."""
        return max(0, self.num_needed - self.num_pairs)


@dataclass(frozen=True)
class EdgeStatus(Plain):
    """Anchors between a source and one of the reader's slots.

    Attributes:
        edge: its digest.
        slot, source_slot: kinds of the slots.
        num_tokens: anchor tokens there are.
        num_needed: from which on they are used.
        num_enough: from which on none are added.
    """

    edge: str
    slot: str
    source_slot: str
    num_tokens: int
    num_needed: int
    num_enough: int


@dataclass(frozen=True)
class ReaderStatus(Plain):
    """One reader under one policy.

    Attributes:
        reader: its digest.
        slots: kinds of its slots.
        bound: that the rest is about; None: exact reuse only, so nothing is asked of any level.
        level, rung, share, predicted: what the next request would be served with where there is a source for its text:
            whose pairs decide, the rung in words, the share of the moved tokens that is computed at most, and the nats
            that are expected at most. None: it would be computed.
        reason: why it would be.
        levels: the most specific first, along each ladder of the policy.
        edges: that lead to it and have anchors.
        num_requests, num_approximated, num_audits, num_violations: of this reader, since it was first seen; violations
            among its latest audits at this bound.
        num_waiting: jobs of the engine that are not done, for whomever.
        learning_s: seconds that such jobs have taken so far.
    """

    reader: str
    slots: tuple[str, ...]
    bound: Bound | None = None
    level: Level | None = None
    rung: str | None = None
    share: float | None = None
    predicted: float | None = None
    reason: Reason | None = None
    levels: tuple[LevelStatus, ...] = ()
    edges: tuple[EdgeStatus, ...] = ()
    num_requests: int = 0
    num_approximated: int = 0
    num_audits: int = 0
    num_violations: int = 0
    num_waiting: int = 0
    learning_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Anchor tokens of all its edges."""
        return sum(edge.num_tokens for edge in self.edges)

    def num_pairs(self, level: Level) -> int:
        """Pairs of a level, of the ladder that has most."""
        return max((each.num_pairs for each in self.levels if each.level is level), default=0)

    @property
    def missing(self) -> tuple[str, ...]:
        """What it has of what it takes, level by level and edge by edge, in words."""
        if self.bound is None:
            return ()
        found = []
        for level in dict.fromkeys(each.level for each in self.levels):
            best = max((each for each in self.levels if each.level is level), key=lambda each: each.num_pairs)
            barred = ", barred by audits" if best.is_barred else ""
            found.append(f"{level} {best.num_pairs} of {best.num_needed} pairs{barred}")
        anchors = (
            f"{edge.source_slot} to {edge.slot} {edge.num_tokens} of {edge.num_enough} anchor tokens"
            for edge in self.edges
        )
        return (*found, *anchors)

    def __repr__(self) -> str:
        who = f"ReaderStatus({self.reader[:NUM_DIGITS]} of {', '.join(self.slots) or 'no slots'}"
        if self.bound is None:
            return f"{who}; exact reuse only)"
        told = f"at {self.bound.max_divergence:g} nats and {self.bound.confidence:g}: "
        if self.rung is None:
            told += f"computed ({self.reason})"
        else:
            told += f"{self.rung} by {self.level}, {self.predicted:.3g} nats at most"
        audits = f"{self.num_violations} of {self.num_audits} audits broke the bound"
        jobs = f"{self.num_waiting} jobs waiting" if self.num_waiting else "no job waiting"
        return f"{who}; {told}; {'; '.join(self.missing)}; {audits}; {jobs})"


def status_of(parts: ReuseParts, namespace: str, reader: Reader, policy: ReusePolicy) -> ReaderStatus:
    """A reader, whether it is known or not; its next request's sources are taken to be like those of its latest pair.

    Of a reader without pairs they are taken to be like most of the pooled ones. Pooled pairs of the other kind do not
    count, as they would not for that request.

    Raises:
        InvalidRequest: a rung of the policy names what the engine does not have.
    """
    parts.planner.require_known(policy.rungs)
    found = parts.book.find(namespace, reader.digest) or Standing(reader)
    latest = next(reversed([*found.pairs]), None)
    usual = parts.book.usual_sources(namespace)
    read = usual if latest is None else latest.sources.read
    edges = edges_to(parts, namespace, reader)
    bound = policy.bound
    following: Acceptance | Reason | None = None
    levels: tuple[LevelStatus, ...] = ()
    if bound is not None:
        following = _next(parts, namespace, reader, policy, edges, read)
        levels = tuple(_levels(parts, namespace, reader, policy, bound, read))
    accepted = following if isinstance(following, Acceptance) else None
    return ReaderStatus(
        reader=reader.digest,
        slots=reader.slots,
        bound=bound,
        level=None if accepted is None else accepted.level,
        rung=None if accepted is None else str(accepted.rung),
        share=None if accepted is None else accepted.rung.share,
        predicted=None if accepted is None else accepted.predicted,
        reason=following if isinstance(following, Reason) else None,
        levels=levels,
        edges=tuple(_edge(parts, namespace, edge) for edge in edges),
        num_requests=found.num_requests,
        num_approximated=found.num_approximated,
        num_audits=found.num_audited,
        num_violations=sum(audit.is_violation for audit in found.audits if audit.bound == bound),
        num_waiting=len(parts.idle.jobs),
        learning_s=parts.idle.worked_s,
    )


def edges_to(parts: ReuseParts, namespace: str, reader: Reader) -> list[Edge]:
    """Edges that lead to a reader's slots and have anchors, in order of its slots."""
    edges = [bank.edge for bank in parts.anchors.banks(namespace) if bank.edge.target in reader.targets]
    return sorted(edges, key=lambda edge: (reader.targets.index(edge.target), edge.source))


def _levels(
    parts: ReuseParts, namespace: str, reader: Reader, policy: ReusePolicy, bound: Bound, read: SourcesRead | None
) -> Iterable[LevelStatus]:
    book = parts.book
    for count in book.counts(namespace, reader, policy.ladders, bound, policy.levels, read=read):
        watch = book.find_watch(namespace, reader, count.level, bound)
        yield LevelStatus(
            level=count.level,
            estimator=count.ladder[0].estimator,
            num_pairs=count.num_pairs,
            num_needed=pairs_needed(bound.delta),
            num_settled=count.num_needed,
            is_barred=book.is_barred(namespace, reader, count.level, bound),
            working_delta=bound.delta if watch is None else watch.working_delta,
            num_audits=0 if watch is None else watch.breaker.num_observed,
            num_violations=0 if watch is None else watch.breaker.num_violations,
        )


def _edge(parts: ReuseParts, namespace: str, edge: Edge) -> EdgeStatus:
    estimator = parts.estimators[TokenEstimator.name]
    assert isinstance(estimator, TokenEstimator)
    num_tokens = estimator.evidence(namespace, edge)
    return EdgeStatus(
        edge.digest, edge.slot, edge.source_slot, num_tokens, estimator.settings.min_tokens, estimator.num_enough
    )


def _next(
    parts: ReuseParts,
    namespace: str,
    reader: Reader,
    policy: ReusePolicy,
    edges: Sequence[Edge],
    read: SourcesRead | None,
) -> Acceptance | Reason:
    """What a request would be served with that takes its text by these edges, or why it would be computed."""
    planner = parts.planner
    if planner.immovable:
        return Reason.IMMOVABLE
    usable = [
        ladder
        for ladder in policy.ladders
        if planner.corrections(namespace, ladder[0].estimator, edges or [ANY_EDGE]) is not None
    ]
    return decide(parts.book, namespace, reader, usable, policy, read=read)
