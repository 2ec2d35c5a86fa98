"""Who may start now: a bounded number of engine requests, tenants' own limits, and no more once the server drains.

A place is taken per engine request and given back when that request has ended and its pages are returned. Nothing
waits here but a tenant for its own requests; the engine queues what has been admitted. So the queue is bounded, and
whoever does not fit is told at once when to come back. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvcomm.server.errors import CLOSE, ApiError
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tenants import Tenant


class Admission:
    """Places for engine requests."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.num_in_flight = 0
        self.is_draining = False

    def drain(self) -> None:
        """Start nothing any more; what is in flight goes on."""
        self.is_draining = True

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused."""
        return self.num_in_flight >= self._settings.max_requests

    def require_open(self) -> None:
        """Raises ApiError 503 when nobody is let in: before anything is tokenized in vain."""
        if self.is_draining:
            raise ApiError(
                503, "draining", "the server is stopping", retry_after_s=self._settings.retry_after_s, headers=CLOSE
            )
        if self.is_full:
            message = f"{self._settings.max_requests} requests are in flight already; try again later"
            raise ApiError(503, "overloaded", message, retry_after_s=self._settings.retry_after_s)

    @asynccontextmanager
    async def place(self, tenant: Tenant, num_tokens: int) -> AsyncIterator[None]:
        """A place for one engine request of a tenant that may grow to `num_tokens`.

        Raises:
            ApiError: 503 when the server is full or draining, 429 when the tenant is at its own limit.
        """
        await self._wait_for_room(tenant, num_tokens)
        self.require_open()
        self._require_own(tenant)
        self.num_in_flight += 1
        tenant.num_requests += 1
        tenant.held_tokens += num_tokens
        try:
            yield
        finally:
            self.num_in_flight -= 1
            tenant.num_requests -= 1
            tenant.held_tokens -= num_tokens
            async with tenant.room:
                tenant.room.notify_all()

    def _require_own(self, tenant: Tenant) -> None:
        limit = tenant.limits.max_requests
        if limit is not None and tenant.num_requests >= limit:
            message = f"{limit} requests of this tenant are in flight already; wait for one of them"
            raise ApiError(429, "too_many_requests", message, retry_after_s=self._settings.retry_after_s)

    async def _wait_for_room(self, tenant: Tenant, num_tokens: int) -> None:
        limit = tenant.limits.held_tokens
        if limit is not None and num_tokens > limit:
            message = f"prompt and answer of up to {num_tokens} tokens exceed this tenant's quota of {limit}"
            raise ApiError(400, "request_too_large", message, param="max_tokens")
        if tenant.has_room(num_tokens):
            return
        full = ApiError(
            429,
            "quota_exceeded",
            f"requests of this tenant in flight may grow to {tenant.held_tokens} of its {limit} tokens, and this one "
            f"needs {num_tokens}; wait for one of them",
            retry_after_s=self._settings.retry_after_s,
        )
        if tenant.limits.when_full == "refuse":
            raise full
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s), tenant.room:
                await tenant.room.wait_for(lambda: self.is_draining or tenant.has_room(num_tokens))
        except TimeoutError:
            raise full from None
