"""`GET /v1/stats`: one tenant's own numbers, for the dashboard and `kvcomm top`.

Everything here is read from what belongs to the caller's tenant: its tally, its namespaces of the tree, its readers.
How full the pool is or how long the queue is depends on others, so it is the operator's to know. What stands under the
engine's lock is read in a worker thread, so that no other request waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from fastapi import APIRouter, Depends

from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Usage
from kvcomm.memory.tree import Drop
from kvcomm.server.access import security
from kvcomm.server.errors import documented
from kvcomm.server.history import STEP_S, History
from kvcomm.server.reuse_views import MAX_SHOWN, audit_records, reader_standings, watched_bounds
from kvcomm.server.schemas.stats import (
    AuditRecord,
    CacheUse,
    Curves,
    Eviction,
    FinishedRequest,
    LastMinute,
    ReaderStanding,
    RefusedRequest,
    Stats,
    TenantHoldings,
    TokensBySource,
    TtftHistogram,
    WatchedBound,
)
from kvcomm.server.state import ServerState, StateDep, TenantDep
from kvcomm.server.tally import COUNTED, SECONDS, SOURCES, Finished, Tally, sources_of
from kvcomm.server.tenants import Tenant

router = APIRouter(tags=["insight"], dependencies=[Depends(security)])


@router.get("/v1/stats", operation_id="stats", responses=documented(401, 403, 429, 500))
async def stats(tenant: TenantDep, state: StateDep) -> Stats:
    """What your own requests came to, what of them is cached, what was dropped, and how audits judge your bounds."""
    work = partial(_look, state.engine, list(tenant.salts), tenant.limits.cached_tokens, state.clock)
    seen = await state.workers.run(tenant.name, 0, work)
    tally = tenant.tally
    return Stats(
        model=state.settings.name,
        uptime_s=state.clock() - state.started_s,
        requests=tally.num_requests,
        requests_in_flight=tenant.num_requests,
        generated_tokens=tally.generated_tokens,
        tokens=TokensBySource(**{source: tally.tokens[source] for source in SOURCES}),
        miss_reasons=dict(tally.misses),
        ttft=TtftHistogram(bounds_s=list(SECONDS), counts=tally.ttft_counts, sum_s=tally.ttft_sum_s),
        finish_reasons=dict(tally.finish_reasons),
        last_minute=_last_minute(tally.history),
        curves=_curves(tally.history),
        refused=_refused(tally),
        recent=_recent(tally),
        cache=seen.cache,
        kept=_kept(state, tenant),
        evictions=seen.evictions,
        readers=seen.readers,
        bounds=seen.bounds,
        audits=seen.audits,
    )


class _Seen(NamedTuple):
    """What the engine knows of a tenant."""

    cache: CacheUse
    evictions: list[Eviction]
    readers: list[ReaderStanding]
    bounds: list[WatchedBound]
    audits: list[AuditRecord]


def _look(engine: Engine, spaces: Sequence[str], quota_tokens: int | None, clock: Callable[[], float]) -> _Seen:
    with engine.cache.unchanged():
        namespaces = [each for space in spaces for each in engine.tenancy.namespaces(space)]
        return _Seen(
            _cache(engine, namespaces, quota_tokens),
            _evictions(engine, namespaces),
            reader_standings(engine, namespaces),
            watched_bounds(engine, namespaces),
            audit_records(engine, namespaces, clock()),
        )


def _last_minute(history: History) -> LastMinute:
    return LastMinute(seconds=history.minute_s, **{name: history.last_minute(name) for name in COUNTED})


def _curves(history: History) -> Curves:
    return Curves(step_s=STEP_S, **{name: history.curve(name) for name in COUNTED})


def _refused(tally: Tally) -> list[RefusedRequest]:
    now_s = tally.clock()
    return [
        RefusedRequest(
            ago_s=now_s - each.at_s,
            method=each.method,
            path=each.path,
            status=each.status,
            code=each.code,
            param=each.param,
            message=each.message,
            request_id=each.request_id,
        )
        for each in reversed(tally.refused)
    ]


def _recent(tally: Tally) -> list[FinishedRequest]:
    now_s = tally.clock()
    return [_finished(each, now_s) for each in reversed(tally.recent)]


def _finished(finished: Finished, now_s: float) -> FinishedRequest:
    usage: Usage = finished.usage
    return FinishedRequest(
        ago_s=now_s - finished.at_s,
        tokens=TokensBySource(**sources_of(usage)),
        generated_tokens=usage.generated_tokens,
        ttft_s=usage.ttft_s,
        total_s=usage.total_s,
        miss_reasons=dict(usage.reasons),
    )


def _cache(engine: Engine, namespaces: Sequence[str], quota_tokens: int | None) -> CacheUse:
    usages = [engine.cache.usage(each) for each in namespaces]
    return CacheUse(
        tokens=sum(usage.num_tokens for usage in usages),
        bytes=sum(usage.num_pages for usage in usages) * engine.cache.page_bytes,
        quota_tokens=quota_tokens,
        evicted_tokens=sum(usage.evicted_tokens for usage in usages),
        expired_tokens=sum(usage.expired_tokens for usage in usages),
        over_quota_tokens=sum(usage.quota_tokens for usage in usages),
        eviction=engine.config.eviction,
    )


def _kept(state: ServerState, tenant: Tenant) -> TenantHoldings:
    contexts, segments = state.contexts.find(tenant.name), state.registries.find(tenant.name)
    return TenantHoldings(
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


def _evictions(engine: Engine, namespaces: Sequence[str]) -> list[Eviction]:
    drops = [drop for namespace in namespaces for drop in engine.cache.recent_drops(namespace)]
    drops.sort(key=lambda each: each[0])
    return [_eviction(engine, ago_s, drop) for ago_s, drop in drops[:MAX_SHOWN]]


def _eviction(engine: Engine, ago_s: float, drop: Drop) -> Eviction:
    label = engine.texts.decode(drop.head)
    return Eviction(ago_s=ago_s, start=drop.start, tokens=drop.num_tokens, reason=drop.reason, label=label)
