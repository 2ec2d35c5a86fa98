"""`GET /v1/stats`: what the caller's own tenant did and holds; never a number of anybody else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel


class TokensBySource(ResponseModel):
    """Tokens of prompts, by how their KV came about."""

    exact: int
    aligned: int
    computed: int


class TtftHistogram(ResponseModel):
    """Requests by the time to their first token."""

    bounds_s: Annotated[list[float], Field(description="Upper ends of the buckets; one more bucket has none.")]
    counts: Annotated[list[int], Field(description="Requests in each bucket, not cumulative.")]
    sum_s: float


class FinishedRequest(ResponseModel):
    """One of the latest requests."""

    ago_s: float
    tokens: TokensBySource
    generated_tokens: int
    ttft_s: float
    total_s: float
    miss_reasons: dict[str, int]


class CacheUse(ResponseModel):
    """The tenant's cached prefixes, over all its salts."""

    tokens: int
    bytes: Annotated[int, Field(description="Of the distinct pages that hold them.")]
    quota_tokens: Annotated[int | None, Field(description="Tokens that may be cached; null is no limit.")]
    evicted_tokens: Annotated[int, Field(description="Dropped because their pages were needed.")]
    expired_tokens: Annotated[int, Field(description="Dropped because they outlived their TTL.")]
    over_quota_tokens: Annotated[int, Field(description="Dropped for the tenant's own quota.")]


class Kept(ResponseModel):
    """What the tenant keeps by name or id, and how much of it may be."""

    contexts: int
    max_contexts: int
    context_tokens: int
    conversation_bytes: Annotated[int, Field(description="Messages and tools that contexts keep beside their KV.")]
    max_kept_bytes: Annotated[int, Field(description="Of those bytes.")]
    segments: int
    max_segments: int
    segment_bytes: Annotated[int, Field(description="Texts of named segments, all versions.")]
    max_segment_bytes: int


class Eviction(ResponseModel):
    """A stretch of a cached prefix that was dropped."""

    ago_s: float
    start: Annotated[int, Field(description="Position of the first dropped token in its prompt.")]
    tokens: int
    reason: Annotated[str, Field(description="evicted, expired, quota, or reset: cleared by the operator.")]
    label: Annotated[str, Field(description="How the dropped text begins.")]


class WatchedBound(ResponseModel):
    """A bound under which text of one kind of prompt is moved, and how audits judge it."""

    group: Annotated[str, Field(description="Digest of the kind of prompt.")]
    max_divergence: float
    confidence: float
    num_audited: int
    num_violations: int
    tripped: Annotated[bool, Field(description="Too many violations: computed exactly from now on.")]


class AuditRecord(ResponseModel):
    """An approximate answer held against exact computation; divergences in nats."""

    ago_s: float
    group: str
    divergence: Annotated[float | None, Field(description="Measured; null where it is no number.")]
    predicted: Annotated[float | None, Field(description="Expected at most; null where nobody knew.")]
    max_divergence: float
    confidence: float
    violated: bool


class Stats(ResponseModel):
    """The caller's tenant since the server started."""

    object: Literal["stats"] = "stats"
    model: str
    uptime_s: float
    requests: Annotated[int, Field(description="Engine requests that ended well; a completion of 3 prompts has 3.")]
    requests_in_flight: int
    generated_tokens: int
    tokens: TokensBySource
    miss_reasons: Annotated[dict[str, int], Field(description="Computed tokens by reason.")]
    ttft: TtftHistogram
    recent: Annotated[list[FinishedRequest], Field(description="The latest ones, newest first.")]
    cache: CacheUse
    kept: Annotated[Kept | None, Field(description="Null from servers that do not say.")] = None
    evictions: Annotated[list[Eviction], Field(description="The latest ones, newest first.")]
    bounds: list[WatchedBound]
    audits: Annotated[list[AuditRecord], Field(description="The latest ones, newest first.")]
