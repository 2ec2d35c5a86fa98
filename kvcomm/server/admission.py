"""Who may start now: bounded numbers, tenants' own limits, and no more once the server drains.

An HTTP request is let in before its body is read, so that bodies in memory are bounded too. It then takes a place per
engine request, which is free again when that request has ended and its pages are returned. Nothing waits here but a
tenant for its own requests; the engine queues what has been admitted. So every queue is bounded, and whoever does not
fit is told at once when to come back. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from kvcomm.server.errors import CLOSE, ApiError
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tenants import Tenant


class Admission:
    """Counts what is in flight.

    Attributes:
        num_open: HTTP requests with a body that were let in and have not been answered in full.
        num_in_flight: engine requests of those.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.num_open = 0
        self.num_in_flight = 0
        self.is_draining = False

    def drain(self) -> None:
        """Start nothing any more; what is in flight goes on."""
        self.is_draining = True

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused."""
        return max(self.num_open, self.num_in_flight) >= self._settings.max_requests

    @contextmanager
    def letting_in(self) -> Iterator[None]:
        """For the time of an HTTP request with a body; raises what `require_open` does."""
        self.require_open()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def require_open(self) -> None:
        """Raises ApiError 503 when nobody is let in."""
        if self.is_draining:
            raise ApiError(
                503, "draining", "the server is stopping", retry_after_s=self._settings.retry_after_s, headers=CLOSE
            )
        if self.is_full:
            raise self._overloaded()

    @asynccontextmanager
    async def place(self, tenant: Tenant, num_tokens: int) -> AsyncIterator[None]:
        """A place for one engine request of a tenant that may grow to `num_tokens`.

        Raises:
            ApiError: 503 when the server is full, 429 when the tenant is at its own limit.
        """
        await self._wait_for_room(tenant, num_tokens)
        if self.num_in_flight >= self._settings.max_requests:
            raise self._overloaded()
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
            await tenant.freed()

    def _overloaded(self) -> ApiError:
        message = f"{self._settings.max_requests} requests are in flight already; try again later"
        return ApiError(503, "overloaded", message, retry_after_s=self._settings.retry_after_s)

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
        if limit is not None and tenant.context_tokens + num_tokens > limit:
            message = (
                f"contexts of this tenant hold {tenant.context_tokens} of its {limit} tokens, this request may take "
                f"{num_tokens} more; delete contexts, or let some expire"
            )
            raise ApiError(429, "quota_exceeded", message, retry_after_s=self._settings.retry_after_s)
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
                await tenant.room.wait_for(lambda: tenant.has_room(num_tokens))
        except TimeoutError:
            raise full from None
