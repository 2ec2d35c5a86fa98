"""`GET /v1/stats`: what the caller's own tenant did and holds; never a number of anybody else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import LevelName, ResponseModel

NEEDED_PAIRS = "From which on the level may decide, if none of them breaks the bound."
FINISH_REASONS = (
    "Answers by finish reason, prefill: prompts computed ahead; and requests without a whole answer: client_gone, "
    "refused, timed_out, failed."
)
WORKING_DELTA = "Probability of a violation that rungs are chosen by now; at 0 or less nothing is moved."


class TokensBySource(ResponseModel):
    """Tokens of prompts, by how their KV came about."""

    exact: int
    aligned: int
    computed: int
    tier: Annotated[int, Field(description="Of the exact ones, those that came from the shared tier.")] = 0
    read_along: Annotated[int, Field(description="Of the computed ones, those read while they were written.")] = 0


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
    eviction: Annotated[str | None, Field(description="The policy; null from servers that do not say.")] = None


class TenantHoldings(ResponseModel):
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


class LastMinute(ResponseModel):
    """Sums over about the last minute."""

    seconds: Annotated[float, Field(description="That the sums are over: at most 60, less behind the start.")]
    requests: Annotated[int, Field(description="Engine requests that ended well.")]
    refused: Annotated[int, Field(description="Requests that were answered with an error.")]
    prompt_tokens: int
    reused_tokens: Annotated[int, Field(description="Of the prompt tokens: exact or aligned.")]
    generated_tokens: int


class Curves(ResponseModel):
    """Sums over every step of the last minutes, oldest first; the newest step goes on. Tokens count as requests end."""

    step_s: float
    requests: list[int]
    refused: list[int]
    prompt_tokens: list[int]
    reused_tokens: list[int]
    generated_tokens: list[int]


class RefusedRequest(ResponseModel):
    """One of your requests that was answered with an error."""

    ago_s: float
    method: str
    path: str
    status: Annotated[int, Field(description="Of the error; a stream that failed behind its start was sent with 200.")]
    code: str
    param: Annotated[str | None, Field(description="The field at fault.")]
    message: str
    request_id: Annotated[str, Field(description="As in the answer's `x-request-id` and in the log.")]


class Eviction(ResponseModel):
    """A stretch of a cached prefix that was dropped."""

    ago_s: float
    start: Annotated[int, Field(description="Position of the first dropped token in its prompt.")]
    tokens: int
    reason: Annotated[str, Field(description="evicted, expired, quota, or reset: cleared by the operator.")]
    label: Annotated[str, Field(description="How the dropped text begins.")]


class ReaderStanding(ResponseModel):
    """One kind of prompt, told by its template, and what is known of it."""

    reader: Annotated[str, Field(description="Digest of the template.")]
    slots: Annotated[list[str], Field(description="Kinds of what fills the template, in order.")]
    num_requests: Annotated[int, Field(description="In which text could have been moved.")]
    num_approximated: Annotated[int, Field(description="In which text was moved within a bound.")]
    num_audited: int
    num_pairs: Annotated[int, Field(description="Exact prompts of it that were measured.")]
    is_young: Annotated[bool, Field(description="Its approximate requests are still audited one by one.")]


class WatchedBound(ResponseModel):
    """A bound that was asked for, at one level, and how audits judge it."""

    reader: Annotated[str | None, Field(description="Digest of the kind of prompt; null: all of them together.")]
    slots: list[str]
    level: LevelName
    max_divergence: float
    confidence: float
    num_pairs: Annotated[
        int, Field(description="That the level has, of the rungs and the kind of sources of which it has most.")
    ]
    num_needed: Annotated[int, Field(description=NEEDED_PAIRS)]
    working_delta: Annotated[float, Field(description=WORKING_DELTA)]
    num_audited: int
    num_violations: int
    tripped: Annotated[
        bool, Field(description="Too many violations: computed exactly from now on, unless another level decides.")
    ]


class AuditRecord(ResponseModel):
    """An approximate answer held against exact computation; divergences in nats."""

    ago_s: float
    reader: str
    level: LevelName
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
    finish_reasons: Annotated[dict[str, int], Field(default_factory=dict, description=FINISH_REASONS)]
    last_minute: Annotated[LastMinute | None, Field(description="Null from servers that do not say.")] = None
    curves: Annotated[Curves | None, Field(description="Null from servers that do not say.")] = None
    refused: Annotated[list[RefusedRequest], Field(default_factory=list, description="The latest ones, newest first.")]
    recent: Annotated[list[FinishedRequest], Field(description="The latest ones, newest first.")]
    cache: CacheUse
    kept: Annotated[TenantHoldings | None, Field(description="Null from servers that do not say.")] = None
    evictions: Annotated[list[Eviction], Field(description="The latest ones, newest first.")]
    readers: Annotated[list[ReaderStanding], Field(description="The latest ones, newest first.")]
    bounds: Annotated[list[WatchedBound], Field(description="Of all kinds of prompt together, then of each.")]
    audits: Annotated[list[AuditRecord], Field(description="The latest ones, newest first.")]
