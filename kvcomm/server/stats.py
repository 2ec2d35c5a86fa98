"""`GET /v1/stats`: one tenant's own numbers, for the dashboard and `kvcomm top`.

Everything here is read from what belongs to the caller's tenant: its tally, its namespaces of the tree, its edge
groups. How full the pool is or how long the queue is depends on others, so it is the operator's to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastapi import APIRouter, Depends

from kvcomm.align.bound import Bound
from kvcomm.align.groups import Audit, EdgeGroup
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Usage
from kvcomm.memory.tree import Drop
from kvcomm.server.access import security
from kvcomm.server.errors import documented
from kvcomm.server.schemas.stats import (
    AuditRecord,
    CacheUse,
    Eviction,
    FinishedRequest,
    Kept,
    Stats,
    TokensBySource,
    TtftHistogram,
    WatchedBound,
)
from kvcomm.server.state import ServerState, StateDep, TenantDep
from kvcomm.server.tally import SECONDS, Finished, Tally
from kvcomm.server.tenants import Tenant

MAX_SHOWN = 40
"""Evictions and audits in one answer."""

router = APIRouter(tags=["insight"], dependencies=[Depends(security)])


@router.get("/v1/stats", operation_id="stats", responses=documented(401, 403, 429, 500))
async def stats(tenant: TenantDep, state: StateDep) -> Stats:
    """What your own requests came to, what of them is cached, what was dropped, and how audits judge your bounds."""
    tally, engine, now_s = tenant.tally, state.engine, state.clock()
    with engine.lock:
        namespaces = [each for space in tenant.salts for each in engine.namespaces(space)]
        groups = [group for namespace in namespaces for group in engine.reuse.groups.groups(namespace)]
        return Stats(
            model=state.settings.name,
            uptime_s=now_s - state.started_s,
            requests=tally.num_requests,
            requests_in_flight=tenant.num_requests,
            generated_tokens=tally.generated_tokens,
            tokens=_sources(tally.tokens["exact"], tally.tokens["aligned"], tally.tokens["computed"]),
            miss_reasons=dict(tally.misses),
            ttft=TtftHistogram(bounds_s=list(SECONDS), counts=tally.ttft_counts, sum_s=tally.ttft_sum_s),
            recent=_recent(tally),
            cache=_cache(engine, tenant),
            kept=_kept(state, tenant),
            evictions=_evictions(engine, tenant),
            bounds=[bound for group in groups for bound in _bounds(group)],
            audits=_audits(groups, now_s),
        )


def _sources(exact: int, aligned: int, computed: int) -> TokensBySource:
    return TokensBySource(exact=exact, aligned=aligned, computed=computed)


def _recent(tally: Tally) -> list[FinishedRequest]:
    now_s = tally.clock()
    return [_finished(each, now_s) for each in reversed(tally.recent)]


def _finished(finished: Finished, now_s: float) -> FinishedRequest:
    usage: Usage = finished.usage
    return FinishedRequest(
        ago_s=now_s - finished.at_s,
        tokens=_sources(usage.exact_tokens, usage.aligned_tokens, usage.computed_tokens),
        generated_tokens=usage.generated_tokens,
        ttft_s=usage.ttft_s,
        total_s=usage.total_s,
        miss_reasons=dict(usage.reasons),
    )


def _cache(engine: Engine, tenant: Tenant) -> CacheUse:
    usages = [engine.tree.usage(each) for space in tenant.salts for each in engine.namespaces(space)]
    return CacheUse(
        tokens=sum(usage.num_tokens for usage in usages),
        bytes=sum(usage.num_pages for usage in usages) * engine.pool.page_bytes,
        quota_tokens=tenant.limits.cached_tokens,
        evicted_tokens=sum(usage.evicted_tokens for usage in usages),
        expired_tokens=sum(usage.expired_tokens for usage in usages),
        over_quota_tokens=sum(usage.quota_tokens for usage in usages),
    )


def _kept(state: ServerState, tenant: Tenant) -> Kept:
    contexts, segments = state.contexts.find(tenant.name), state.registries.find(tenant.name)
    return Kept(
        contexts=0 if contexts is None else len(contexts.nodes),
        max_contexts=state.settings.max_contexts,
        context_tokens=tenant.context_tokens,
        conversation_bytes=0 if contexts is None else contexts.conversations.num_bytes,
        max_kept_bytes=state.settings.max_kept_bytes,
        segments=0 if segments is None else len(segments.latest),
        max_segments=state.settings.max_segments,
        segment_bytes=0 if segments is None else segments.num_bytes,
        max_segment_bytes=state.settings.max_segment_bytes,
    )


def _evictions(engine: Engine, tenant: Tenant) -> list[Eviction]:
    namespaces = [each for space in tenant.salts for each in engine.namespaces(space)]
    drops = [drop for namespace in namespaces for drop in engine.tree.recent_drops(namespace)]
    drops.sort(key=lambda each: each[0])
    return [_eviction(engine, ago_s, drop) for ago_s, drop in drops[:MAX_SHOWN]]


def _eviction(engine: Engine, ago_s: float, drop: Drop) -> Eviction:
    label = engine.decode(drop.head)
    return Eviction(ago_s=ago_s, start=drop.start, tokens=drop.num_tokens, reason=drop.reason, label=label)


def _bounds(group: EdgeGroup) -> Iterable[WatchedBound]:
    for bound, breaker in group.breakers.items():
        yield WatchedBound(
            group=group.key.digest,
            max_divergence=bound.max_divergence,
            confidence=bound.confidence,
            num_audited=breaker.num_observed,
            num_violations=breaker.num_violations,
            tripped=breaker.tripped,
        )


def _audits(groups: Iterable[EdgeGroup], now_s: float) -> list[AuditRecord]:
    audits = [(audit, group) for group in groups for audit in group.audits]
    audits.sort(key=lambda each: each[0].at_s, reverse=True)
    return [_audit(audit, group, now_s) for audit, group in audits[:MAX_SHOWN]]


def _audit(audit: Audit, group: EdgeGroup, now_s: float) -> AuditRecord:
    bound = Bound(*audit.bound)
    return AuditRecord(
        ago_s=now_s - audit.at_s,
        group=group.key.digest,
        divergence=_finite(audit.divergence),
        predicted=_finite(audit.predicted),
        max_divergence=bound.max_divergence,
        confidence=bound.confidence,
        violated=audit.is_violation,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
