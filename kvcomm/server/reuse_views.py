"""How reuse of moved text stands, as a tenant sees it: readers, what audits say, what is missing for the next level.

Read from the reader book of the engine for the tenant's own namespaces; the prior's pairs are the model's. All of it is
called under the engine's lock, so never on the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvcomm.align.calibration import SourcesRead, pairs_needed
from kvcomm.align.ladder import DEFAULT_RUNGS, ladders_of
from kvcomm.align.levels import Count
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Audit, Level, Standing
from kvcomm.align.watch import Watch
from kvcomm.engine.engine import Engine
from kvcomm.plain import fields_of
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.status import ReaderStatus
from kvcomm.server.schemas.anchors import AnchorStatus, EdgeStatusObject, LevelStatusObject, ReaderStatusObject
from kvcomm.server.schemas.stats import AuditRecord, ReaderStanding, WatchedBound

MAX_SHOWN = 40
"""Of each kind in one answer."""

LADDERS = ladders_of(DEFAULT_RUNGS)
NOBODY = Reader("")
"""Stands for readers of which nothing is known."""


def watched_bounds(engine: Engine, namespaces: Iterable[str]) -> list[WatchedBound]:
    """Every bound that was asked for; those of all readers together first, then reader by reader, the latest first."""
    found = [(name, *each) for name in namespaces for each in engine.reuse.watches(name)]
    together = [each for each in found if each[2] is None]
    apart = [each for each in found if each[2] is not None]
    return [_watched(engine, *each) for each in (*together, *reversed(apart))][:MAX_SHOWN]


def reader_standings(engine: Engine, namespaces: Iterable[str]) -> list[ReaderStanding]:
    """Every reader, the latest first."""
    return [_standing(each) for _, each in _latest(engine, namespaces)]


def audit_records(engine: Engine, namespaces: Iterable[str], now_s: float) -> list[AuditRecord]:
    """The latest audits of all readers, newest first."""
    standings = [each for name in namespaces for each in engine.reuse.standings(name)]
    audits = [(audit, standing.reader) for standing in standings for audit in standing.audits]
    audits.sort(key=lambda each: each[0].at_s, reverse=True)
    return [_audit(audit, reader, now_s) for audit, reader in audits[:MAX_SHOWN]]


def anchor_status(engine: Engine, name: str, spaces: Sequence[str], policy: ReusePolicy) -> AnchorStatus:
    """What is known of moving a tenant's text, and what is missing for a policy. Takes the lock itself.

    Args:
        name: of the tenant.
        spaces: the engine's tenants that are this one's, with salts and without.
    """
    with engine.cache.unchanged():
        namespaces = [each for space in spaces for each in engine.tenancy.namespaces(space)]
        readers = [
            _status(engine.reuse.status_in(namespace, standing.reader, policy))
            for namespace, standing in _latest(engine, namespaces)
        ]
        newcomer = _status(engine.reuse.status_in(engine.namespace(name), NOBODY, policy))
    return AnchorStatus(
        max_divergence=policy.max_divergence,
        confidence=policy.confidence,
        basis=Level(policy.basis).value,
        readers=readers,
        newcomer=newcomer,
    )


def _latest(engine: Engine, namespaces: Iterable[str]) -> list[tuple[str, Standing]]:
    found = [(name, each) for name in namespaces for each in engine.reuse.standings(name)]
    return found[::-1][:MAX_SHOWN]


def _status(told: ReaderStatus) -> ReaderStatusObject:
    return ReaderStatusObject(
        reader=told.reader,
        slots=list(told.slots),
        level=None if told.level is None else told.level.value,
        rung=told.share,
        rung_name=told.rung,
        predicted_divergence=None if told.predicted is None else _finite(told.predicted),
        reason=None if told.reason is None else told.reason.value,
        levels=[LevelStatusObject.model_validate(fields_of(each)) for each in told.levels],
        edges=[EdgeStatusObject.model_validate(fields_of(each)) for each in told.edges],
        num_requests=told.num_requests,
        num_approximated=told.num_approximated,
        num_audits=told.num_audits,
        num_violations=told.num_violations,
    )


def _watched(engine: Engine, namespace: str, level: Level, reader: Reader | None, watch: Watch) -> WatchedBound:
    most = max(_counts(engine, namespace, level, reader, watch), key=lambda count: count.num_pairs)
    return WatchedBound(
        reader=None if reader is None else reader.digest,
        slots=[] if reader is None else list(reader.slots),
        level=level.value,
        max_divergence=watch.bound.max_divergence,
        confidence=watch.bound.confidence,
        num_pairs=most.num_pairs,
        num_needed=pairs_needed(watch.bound.delta),
        working_delta=watch.working_delta,
        num_audited=watch.breaker.num_observed,
        num_violations=watch.breaker.num_violations,
        tripped=watch.is_tripped,
    )


def _counts(engine: Engine, namespace: str, level: Level, reader: Reader | None, watch: Watch) -> list[Count]:
    """Pairs of each kind of sources by themselves, since a request asks for those of its own kind."""
    return [
        count
        for read in SourcesRead
        for count in engine.reuse.counts(namespace, reader or NOBODY, LADDERS, watch.bound, level, read)
    ]


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
