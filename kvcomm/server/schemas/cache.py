"""`/v1/cache/*`: make segments ready, look at what is cached, ask what a request would find."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import MODEL_NAME, Body, ResponseModel, Reuse, Salt
from kvcomm.server.schemas.segments import MAX_SEGMENTS, Boundary, SegmentInput
from kvcomm.server.schemas.usage import Usage


class WarmRequest(Body):
    """Segments to be computed now, for requests that will begin with them."""

    model: Annotated[str, Field(json_schema_extra={"format": MODEL_NAME})]
    segments: Annotated[list[SegmentInput], Field(min_length=1, max_length=MAX_SEGMENTS)]
    boundary: Boundary = "separate"
    cache_salt: Salt | None = None
    reuse: Reuse | None = None


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
    usage: Usage
