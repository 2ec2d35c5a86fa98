"""Who may start now: bounded numbers, fair shares, tenants' own limits, and no more once the server drains.

An HTTP request is let in before its body is read, so that bodies in memory are bounded too. It then takes a place per
engine request, which is free again when that request has ended and its pages are returned. Nothing waits here but a
tenant for its own requests; the engine queues what has been admitted. So every queue is bounded, and whoever does not
fit is told at once when to come back.

Shares are fair by one rule, for HTTP requests and for engine requests alike: into the places kept for others a tenant
gets only as long as it holds no more than it leaves free. One tenant alone takes all but those; a second one finds half
of them, a third half of the rest, however long the first one's answers take. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from kvcomm.server.errors import CLOSE, ApiError
from kvcomm.server.settings import ServerSettings
from kvcomm.server.tenants import Tenant

KEPT_SHARE = 8
"""One place in so many is kept for others, where there may be others."""


class AdmissionControl:
    """Counts what is in flight.

    Attributes:
        num_open: HTTP requests with a body that were let in and have not been answered in full.
        num_in_flight: engine requests of those.
    """

    def __init__(self, settings: ServerSettings, num_tenants: Callable[[], int] = lambda: 1) -> None:
        """`num_tenants`: that may come; where there is only one, nothing is kept for others."""
        self._settings = settings
        self._num_tenants = num_tenants
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

    def kept_of(self, num_places: int) -> int:
        """How many of so many places are kept for tenants who hold few, in proportion to those of requests."""
        most, kept = self._settings.max_requests, self._settings.kept_requests
        if self._num_tenants() < 2 or kept == 0:
            return 0
        wanted = num_places // KEPT_SHARE if kept is None else kept * num_places // most
        return min(num_places - 1, max(1, wanted))

    @contextmanager
    def letting_in(self, tenant: Tenant, *, computes: bool) -> Iterator[None]:
        """For the time of an HTTP request with a body, from before it is read.

        Args:
            computes: it will ask for engine requests, whose number a tenant's own limit is about.

        Raises:
            ApiError: 503 when the server is full or drains, 429 when the tenant is at its own limit or its share.
        """
        self.require_open()
        limit = tenant.limits.max_requests
        if computes and limit is not None and tenant.num_computing >= limit:
            raise self._too_many(limit)
        self._require_share(tenant.num_open, self._settings.max_requests - self.num_open, 1)
        self.num_open += 1
        tenant.num_open += 1
        tenant.num_computing += computes
        try:
            yield
        finally:
            self.num_open -= 1
            tenant.num_open -= 1
            tenant.num_computing -= computes

    def require_places(self, tenant: Tenant, num_places: int) -> None:
        """Look, before anything is done for them, whether so many engine requests of one HTTP request would start.

        Raises:
            ApiError: 400 when they never will, 429 or 503 when they will not now.
        """
        limit = min(tenant.limits.max_requests or self._settings.max_requests, self._settings.max_requests)
        if num_places > limit:
            message = f"{num_places} prompts in one request are more than the {limit} requests that may be in flight"
            raise ApiError(400, "too_many_prompts", message, param="prompt")
        self._require_own(tenant, num_places)
        self._require_share(tenant.num_requests, self._settings.max_requests - self.num_in_flight, num_places)

    @asynccontextmanager
    async def place(self, tenant: Tenant, num_tokens: int) -> AsyncIterator[None]:
        """A place for one engine request of a tenant that may grow to `num_tokens`.

        Raises:
            ApiError: 503 when the server is full, 429 when the tenant is at its own limit or its share.
        """
        await self._wait_for_room(tenant, num_tokens)
        self._require_own(tenant, 1)
        self._require_share(tenant.num_requests, self._settings.max_requests - self.num_in_flight, 1)
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

    def require_open(self) -> None:
        """Raises ApiError 503 when nobody is let in."""
        if self.is_draining:
            raise ApiError(
                503, "draining", "the server is stopping", retry_after_s=self._settings.retry_after_s, headers=CLOSE
            )
        if self.is_full:
            raise self._overloaded()

    def _require_share(self, num_held: int, num_free: int, num_wanted: int) -> None:
        if num_wanted > num_free:
            raise self._overloaded()
        num_left = num_free - num_wanted
        if (
            num_left < self.kept_of(self._settings.max_requests) and num_held + num_wanted > num_left + 1
        ):  # the last one counts as its own, not free
            message = (
                f"this tenant has {num_held} requests in flight, and the places that are left are kept for others; "
                "wait for one of them"
            )
            raise ApiError(429, "fair_share", message, retry_after_s=self._settings.retry_after_s)

    def _overloaded(self) -> ApiError:
        message = f"{self._settings.max_requests} requests are in flight already; try again later"
        return ApiError(503, "overloaded", message, retry_after_s=self._settings.retry_after_s)

    def _too_many(self, limit: int) -> ApiError:
        message = f"{limit} requests of this tenant are in flight already; wait for one of them"
        return ApiError(429, "too_many_requests", message, retry_after_s=self._settings.retry_after_s)

    def _require_own(self, tenant: Tenant, num_wanted: int) -> None:
        limit = tenant.limits.max_requests
        if limit is not None and tenant.num_requests + num_wanted > limit:
            raise self._too_many(limit)

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
