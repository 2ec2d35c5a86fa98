"""`/v1/cache/*`: make segments ready, look at what is cached, ask what a request would find."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import MODEL_NAME, Body, Label, ResponseModel, ReuseOptions, Salt
from kvcomm.server.schemas.segments import MAX_SEGMENTS, Boundary, SegmentInput
from kvcomm.server.schemas.usage import PlanSpan, UsageObject


class WarmRequest(Body):
    """Segments to be computed now, for requests that will begin with them."""

    model: Annotated[Label, Field(json_schema_extra={"format": MODEL_NAME})]
    segments: Annotated[list[SegmentInput], Field(min_length=1, max_length=MAX_SEGMENTS, fail_fast=True)]
    boundary: Boundary = "separate"
    cache_salt: Salt | None = None
    reuse: ReuseOptions | None = None


class CachedSegment(ResponseModel):
    """A segment of a request, and how much of it is cached behind the segments before it."""

    id: str
    hash: Annotated[str, Field(description="SHA-256 over your namespace and its token ids: a `hash` for requests.")]
    tokens: int
    cached_tokens: int


class Warmed(ResponseModel):
    """What a warm call left in the cache."""

    object: Literal["cache.warm"] = "cache.warm"
    cached_segments: Annotated[int, Field(description="Leading segments all of whose tokens are cached now.")]
    root_hash: Annotated[str, Field(description="Of the whole chain: SHA-256 over all its token ids.")]
    tokens: int
    segments: list[CachedSegment]
    usage: UsageObject


class Cost(ResponseModel):
    """What a prompt would take up to its first token, on a machine that does nothing else."""

    computed_tokens: int
    prefill_s: Annotated[float | None, Field(description="Predicted seconds; null until the machine was measured.")]
    cold_s: Annotated[float | None, Field(description="The same with nothing cached.")]


class ExplainedPrompt(ResponseModel):
    """What one prompt would find: tokens = cached_prefix_tokens + aligned_tokens + cost.computed_tokens."""

    tokens: int
    cached_prefix_tokens: int
    aligned_tokens: int
    miss_reasons: Annotated[dict[str, int], Field(description="Why tokens would be computed: reason -> tokens.")]
    rung: Annotated[float | None, Field(description="Share of the moved tokens that would be recomputed at most.")]
    predicted_divergence: Annotated[float | None, Field(description="Nats expected at most; null: nothing is moved.")]
    cost: Cost
    segments: list[CachedSegment]
    plan: Annotated[list[PlanSpan], Field(description="Spans of the prompt, in order and without gaps.")]


class CacheExplanation(ResponseModel):
    """What a request would find in the cache; it has not been made, and nothing was changed."""

    object: Literal["cache.explanation"] = "cache.explanation"
    prompts: Annotated[list[ExplainedPrompt], Field(description="One for each prompt of the request.")]


class CacheNode(ResponseModel):
    """A piece of what is cached.

    A prefix continues its parent; a segment has renditions, each a KV of its text behind one prefix; a salt has what
    requests with one `cache_salt` left.
    """

    id: str
    label: Annotated[str | None, Field(description="A segment's name, or how the text begins.")]
    kind: Literal["root", "salt", "prefix", "segment", "rendition"]
    tokens: int
    bytes: Annotated[int, Field(description="KV of its tokens; a rendition's is often that of a prefix too.")]
    fidelity: Literal["exact", "approximate"]
    last_used_s: Annotated[float | None, Field(description="Seconds ago.")]
    pinned: Annotated[bool, Field(description="Kept by `Engine.pin` of the serving process; only a prefix can be.")]
    expires_in_s: Annotated[float | None, Field(description="Unless it is used, or its pages are needed before.")]
    children: list[CacheNode]


class CacheTree(ResponseModel):
    """The caller's cache."""

    object: Literal["cache.tree"] = "cache.tree"
    bytes: Annotated[int, Field(description="Of the distinct pages of prefixes.")]
    tokens: Annotated[int, Field(description="Of prefixes.")]
    left_out: Annotated[int, Field(description="Nodes too deep or too many to be listed.")]
    root: CacheNode
