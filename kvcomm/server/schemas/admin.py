"""What the operator sees."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel
from kvcomm.server.settings import Limits


class TenantStatus(ResponseModel):
    """What a tenant holds now, and what it may."""

    name: str
    has_key: Annotated[bool, Field(description="Somebody can ask for it; without a key file, anybody.")]
    requests_in_flight: int
    held_tokens: int
    cached_tokens: int
    contexts: int
    pinned_contexts: int
    context_tokens: int
    conversation_bytes: Annotated[int, Field(description="Messages and tools that contexts keep beside their KV.")]
    segments: int
    segment_bytes: Annotated[int, Field(description="Texts of named segments, all versions.")]
    salts: int
    limits: Limits


class ServerStatus(ResponseModel):
    """The pool and the queue, and every tenant that has asked for something."""

    is_draining: bool
    requests_in_flight: int
    requests_running: int
    requests_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    page_bytes: int
    tenants: list[TenantStatus]


class TenantList(ResponseModel):
    """Every tenant that has a key, has asked for something since the server started, or has snapshots."""

    object: Literal["list"] = "list"
    data: list[TenantStatus]


class DeletedSegments(ResponseModel):
    """What is no more."""

    object: Literal["segment.deleted"] = "segment.deleted"
    deleted: Annotated[list[str], Field(description="Names, all versions of them.")]


class DeletedSnapshots(ResponseModel):
    """What is no more."""

    object: Literal["snapshot.deleted"] = "snapshot.deleted"
    deleted: list[str]


class RemovedTenant(ResponseModel):
    """What a tenant had, and has no more."""

    object: Literal["tenant.removed"] = "tenant.removed"
    name: str
    cancelled_requests: int
    contexts: int
    segments: int
    cached_tokens: int
    snapshots: Annotated[int, Field(description="Files; only where they were asked for.")]


class Cleared(ResponseModel):
    """What was dropped."""

    cleared_tokens: int


class AnchorsTaken(ResponseModel):
    """What was put in place."""

    num_banks: int
    num_readers: int
    num_pairs: Annotated[int, Field(description="Exact prompts that were measured.")]
    num_missing: Annotated[
        int, Field(description="Banks that pairs were measured with and that are not there; rungs that need them wait.")
    ]
