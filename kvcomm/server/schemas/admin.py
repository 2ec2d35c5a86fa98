"""What the operator sees."""

from __future__ import annotations

from kvcomm.server.schemas.common import ResponseModel
from kvcomm.server.settings import Limits


class TenantStatus(ResponseModel):
    """What a tenant holds now, and what it may."""

    name: str
    requests_in_flight: int
    held_tokens: int
    cached_tokens: int
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


class Cleared(ResponseModel):
    """What was dropped."""

    cleared_tokens: int


class AnchorsTaken(ResponseModel):
    """What was put in place."""

    num_banks: int
    num_groups: int
