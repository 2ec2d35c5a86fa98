"""How reuse of moved text stands, as a tenant sees it: readers, what audits say, what is missing for the next level.

Read from the reader book of the engine for the tenant's own namespaces; the prior's pairs are the model's. All of it is
called under the engine's lock, so never on the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from kvcomm.align.bound import Bound
from kvcomm.align.ladder import DEFAULT_RUNGS, Ladder, ladders_of
from kvcomm.align.levels import LEVELS, Audit, Count, Level, Standing
from kvcomm.align.readers import Reader
from kvcomm.align.wanted import best_count, pairs_wanted, tokens_wanted
from kvcomm.align.watch import Watch
from kvcomm.engine.engine import Engine
from kvcomm.server.schemas.anchors import AnchorStatus, BankStanding, PairCount, ReaderCounts
from kvcomm.server.schemas.stats import AuditRecord, ReaderStanding, WatchedBound

MAX_SHOWN = 40
"""Of each kind in one answer."""

LADDERS = ladders_of(DEFAULT_RUNGS)
_NOBODY = Reader("")


def watched_bounds(engine: Engine, namespaces: Iterable[str]) -> list[WatchedBound]:
    """Every bound that was asked for; those of all readers together first, then reader by reader, the latest first."""
    found = [(name, *each) for name in namespaces for each in engine.reuse.book.watches(name)]
    together = [each for each in found if each[2] is None]
    apart = [each for each in found if each[2] is not None]
    return [_watched(engine, *each) for each in (*together, *reversed(apart))][:MAX_SHOWN]


def reader_standings(engine: Engine, namespaces: Iterable[str]) -> list[ReaderStanding]:
    """Every reader, the latest first."""
    return [_standing(each) for _, each in _latest(engine, namespaces)]


def audit_records(engine: Engine, namespaces: Iterable[str], now_s: float) -> list[AuditRecord]:
    """The latest audits of all readers, newest first."""
    standings = [each for name in namespaces for each in engine.reuse.book.standings(name)]
    audits = [(audit, standing.reader) for standing in standings for audit in standing.audits]
    audits.sort(key=lambda each: each[0].at_s, reverse=True)
    return [_audit(audit, reader, now_s) for audit, reader in audits[:MAX_SHOWN]]


def anchor_status(engine: Engine, spaces: Sequence[str], bound: Bound) -> AnchorStatus:
    """What is known of moving a tenant's text, and what is missing for a bound. Takes the lock itself.

    Args:
        spaces: the engine's tenants that are the server's one.
    """
    book = engine.reuse.book
    with engine.lock:
        namespaces = [each for space in spaces for each in engine.namespaces(space)]
        return AnchorStatus(
            max_divergence=bound.max_divergence,
            confidence=bound.confidence,
            shared=_shared(engine, namespaces, bound),
            readers=[
                ReaderCounts(
                    **_standing(standing).model_dump(),
                    levels=[_count(each, bound) for each in book.counts(name, standing.reader, LADDERS, bound, LEVELS)],
                )
                for name, standing in _latest(engine, namespaces)
            ],
            banks=list(_banks(engine, namespaces)),
        )


def _shared(engine: Engine, namespaces: Iterable[str], bound: Bound) -> list[PairCount]:
    """Pairs of the levels that belong to no single reader; each salt has a pool of its own, so of the one with most."""
    most: dict[tuple[Level, Ladder], Count] = {}
    for name in namespaces:
        for each in engine.reuse.book.counts(name, _NOBODY, LADDERS, bound, (Level.POOL, Level.PRIOR)):
            known = most.setdefault((each.level, each.ladder), each)
            if each.num_pairs > known.num_pairs:
                most[each.level, each.ladder] = each
    return [_count(each, bound) for each in most.values()]


def _latest(engine: Engine, namespaces: Iterable[str]) -> list[tuple[str, Standing]]:
    found = [(name, each) for name in namespaces for each in engine.reuse.book.standings(name)]
    return found[::-1][:MAX_SHOWN]


def _watched(engine: Engine, namespace: str, level: Level, reader: Reader | None, watch: Watch) -> WatchedBound:
    counts = engine.reuse.book.counts(namespace, reader or _NOBODY, LADDERS, watch.bound, (level,))
    most = best_count(counts)
    return WatchedBound(
        reader=None if reader is None else reader.digest,
        slots=[] if reader is None else list(reader.slots),
        level=level.value,
        max_divergence=watch.bound.max_divergence,
        confidence=watch.bound.confidence,
        num_pairs=most.num_pairs,
        num_wanted=pairs_wanted(most, watch.bound),
        working_delta=watch.working_delta,
        num_audited=watch.breaker.num_observed,
        num_violations=watch.breaker.num_violations,
        tripped=watch.is_tripped,
    )


def _count(count: Count, bound: Bound) -> PairCount:
    return PairCount(
        level=count.level.value,
        estimator=count.ladder[0].estimator,
        num_pairs=count.num_pairs,
        num_wanted=pairs_wanted(count, bound),
    )


def _standing(standing: Standing) -> ReaderStanding:
    return ReaderStanding(
        reader=standing.reader.digest,
        slots=list(standing.reader.slots),
        num_requests=standing.num_requests,
        num_approximated=standing.num_approximated,
        num_audited=standing.num_audited,
        num_pairs=len(standing.pairs),
        is_young=standing.is_young,
    )


def _banks(engine: Engine, namespaces: Iterable[str]) -> Iterator[BankStanding]:
    anchors = engine.reuse.anchors
    snapshots = [bank.snapshot() for name in namespaces for bank in anchors.banks(name)]
    for each in sorted(snapshots, key=lambda bank: -bank.num_tokens)[:MAX_SHOWN]:
        yield BankStanding(
            edge=each.edge.digest,
            slot=each.edge.slot,
            source_slot=each.edge.source_slot,
            in_any_context=each.edge.is_general,
            num_tokens=each.num_tokens,
            num_wanted=tokens_wanted(each.num_tokens, max_tokens=anchors.max_bank_tokens),
        )


def _audit(audit: Audit, reader: Reader, now_s: float) -> AuditRecord:
    return AuditRecord(
        ago_s=now_s - audit.at_s,
        reader=reader.digest,
        level=audit.level.value,
        divergence=_finite(audit.divergence),
        predicted=_finite(audit.predicted),
        max_divergence=audit.bound.max_divergence,
        confidence=audit.bound.confidence,
        violated=audit.is_violation,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
