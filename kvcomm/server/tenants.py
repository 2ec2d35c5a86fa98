"""Tenants: the namespaces of their KV, what they may take, and what they hold now.

A tenant's name comes from its key, never from the request. What of a request may divide its cache further is a salt,
and the two together are encoded so that no name and salt can spell another tenant. All counters here belong to one
tenant and are told to nobody else. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.server.errors import ApiError
from kvcomm.server.followed import FollowedAnswers
from kvcomm.server.keys import KeyRing
from kvcomm.server.settings import Limits, ServerSettings
from kvcomm.server.tally import Tally
from kvcomm.tiers.space import DEFAULT_TENANT

SECONDS_PER_MINUTE = 60


class TokenBucket:
    """A rate with bursts: fills up to a minute's worth, each request takes one."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._capacity = max(1.0, per_minute)
        self._level = self._capacity
        self._at_s = clock()

    def take(self) -> float:
        """Take one; 0.0 if there was one, else the seconds until there will be."""
        now = self._clock()
        rate = self.per_minute / SECONDS_PER_MINUTE
        self._level = min(self._capacity, self._level + (now - self._at_s) * rate)
        self._at_s = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / rate


@dataclass(eq=False)
class Tenant:
    """One tenant while the server runs.

    Law: `num_requests` and `held_tokens` are the sums over its engine requests in flight, `num_open` and
    `num_computing` those over its HTTP requests with a body; all return to 0.

    Attributes:
        limits: in force; followed from the key file.
        num_open, num_computing: HTTP requests let in and not answered in full; those of them that ask the engine.
        held_tokens: tokens that its requests in flight may grow to.
        context_tokens: token slots that its contexts hold, shared ones once; followed by its `ContextRegistry`.
        salts: namespaces it has opened, least recently used first.
        tally: what its requests came to.
        running: its requests in the engine.
        sources: answers that its requests may follow.
        is_gone: the operator has removed it; whoever still works for it leaves nothing behind.
    """

    name: str
    limits: Limits
    bucket: TokenBucket | None = None
    num_requests: int = 0
    num_open: int = 0
    num_computing: int = 0
    held_tokens: int = 0
    context_tokens: int = 0
    salts: OrderedDict[str, None] = field(default_factory=OrderedDict)
    tally: Tally = field(default_factory=Tally)
    room: asyncio.Condition = field(default_factory=asyncio.Condition)
    running: set[RequestHandle] = field(default_factory=set)
    sources: FollowedAnswers = field(default_factory=FollowedAnswers)
    is_gone: bool = False

    def require_there(self) -> None:
        """Raises ApiError 409 when the operator has removed it."""
        if self.is_gone:
            raise self.removed()

    def removed(self) -> ApiError:
        """What its requests are told then."""
        return ApiError(409, "tenant_removed", "the operator has removed what this tenant had, this request too")

    def follow(self, limits: Limits, clock: Callable[[], float]) -> None:
        """Put limits in force."""
        per_minute = limits.requests_per_minute
        if per_minute is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.per_minute != per_minute:
            self.bucket = TokenBucket(per_minute, clock=clock)
        self.limits = limits

    def require_rate(self) -> None:
        """Raises ApiError 429 when it asks more often than it may."""
        wait_s = self.bucket.take() if self.bucket is not None else 0.0
        if wait_s:
            assert self.bucket is not None
            message = f"more than {self.bucket.per_minute:g} requests per minute; try again in {math.ceil(wait_s)} s"
            raise ApiError(429, "rate_limit_exceeded", message, retry_after_s=wait_s)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a request that may grow to so many tokens fits beside those in flight and the contexts."""
        limit = self.limits.held_tokens
        return limit is None or self.context_tokens + self.held_tokens + num_tokens <= limit

    async def freed(self) -> None:
        """Let those look again who wait for room."""
        async with self.room:
            self.room.notify_all()


class Tenants:
    """Every tenant that has asked for something."""

    def __init__(
        self, engine: Engine, settings: ServerSettings, keys: KeyRing | None, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._keys = keys
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}

    def get(self, name: str = DEFAULT_TENANT) -> Tenant:
        """A tenant with the limits that hold now."""
        tenant, limits = self._tenants.get(name), self.limits_of(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(
                name, limits, tally=Tally(self._clock), sources=FollowedAnswers(self._clock)
            )
            tenant.follow(limits, self._clock)
        elif tenant.limits != limits:
            tenant.follow(limits, self._clock)
            for space in tenant.salts:
                self._engine.cache.set_quota(cached_tokens=limits.cached_tokens, tenant=space)
        return tenant

    def limits_of(self, name: str) -> Limits:
        """What a tenant of that name may take."""
        return (self._keys.limits_of(name) if self._keys is not None else None) or self._settings.limits

    @property
    def with_keys(self) -> list[str]:
        """Names of tenants that have a key."""
        return [] if self._keys is None else [each.tenant for each in self._keys.records if each.tenant is not None]

    def find(self, name: str) -> Tenant | None:
        """A tenant that has asked for something."""
        return self._tenants.get(name)

    def remove(self, name: str) -> Tenant | None:
        """Forget a tenant: who asks for it from now on gets a new one, and who has it may keep nothing for it."""
        tenant = self._tenants.pop(name, None)
        if tenant is not None:
            tenant.is_gone = True
        return tenant

    def is_revoked(self, name: str) -> bool:
        """Whether no key is this tenant's any more; without keys nobody's can be."""
        return self._keys is not None and not self._keys.has_tenant(name)

    @property
    def names(self) -> list[str]:
        """Names of those that have asked for something."""
        return sorted(self._tenants)

    def open_namespace(self, tenant: Tenant, salt: str | None) -> str:
        """The engine's tenant for a tenant's requests with a salt; keeps the number of salts bounded."""
        space = namespace(tenant.name, salt)
        is_new = space not in tenant.salts
        tenant.salts[space] = None
        tenant.salts.move_to_end(space)
        if is_new and tenant.limits.cached_tokens is not None:
            self._engine.cache.set_quota(cached_tokens=tenant.limits.cached_tokens, tenant=space)
        while len(tenant.salts) > self._settings.max_salts:
            oldest, _ = tenant.salts.popitem(last=False)
            self._engine.forget(oldest)
        return space

    def num_cached(self, tenant: Tenant) -> int:
        """Tokens of its cached prefixes, over all its salts."""
        with self._engine.cache.unchanged():
            return sum(self._num_cached(space) for space in list(tenant.salts))

    def clear(self, tenant: Tenant) -> int:
        """Drop its cached prefixes; returns how many tokens went."""
        before = self.num_cached(tenant)
        for space in list(tenant.salts):
            self._engine.cache.clear(tenant=space)
        return before - self.num_cached(tenant)

    def forget(self, tenant: Tenant) -> int:
        """Drop whatever the engine knows of it, under all salts; returns how many cached tokens went."""
        before = self.num_cached(tenant)
        for space in list(tenant.salts):
            self._engine.forget(space)
        return before - self.num_cached(tenant)

    def keep_quota(self, tenant: Tenant) -> None:
        """Drop the tenant's least recently used namespaces while all of them together exceed its quota."""
        limit = tenant.limits.cached_tokens
        if limit is None or len(tenant.salts) < 2:  # one namespace keeps its quota by itself
            return
        with self._engine.cache.unchanged():
            sizes = {space: self._num_cached(space) for space in tenant.salts}
            total = sum(sizes.values())
            for space in list(sizes)[:-1]:
                if total <= limit:
                    return
                self._engine.forget(space)
                del tenant.salts[space]
                total -= sizes[space]

    def _num_cached(self, space: str) -> int:
        return sum(self._engine.cache.usage(each).num_tokens for each in self._engine.tenancy.namespaces(space))


def namespace(tenant: str, salt: str | None) -> str:
    """The engine's tenant for a tenant and a salt; different pairs never give the same.

    A tenant's name begins with a letter or digit, a pair with a bracket.
    """
    return tenant if salt is None else json.dumps([tenant, salt])
