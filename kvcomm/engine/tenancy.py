"""Whose KV is whose: the namespaces that tenants' KV is cached under, and how much each may have."""

from __future__ import annotations

from functools import lru_cache
from threading import RLock

from kvcomm import values
from kvcomm.align.levels import ReaderBook
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.holdings import Holdings
from kvcomm.errors import InvalidRequest
from kvcomm.memory.memory import Memory
from kvcomm.model.live import Weights

MAX_NAMES = 1024
"""Namespaces that are remembered: making the name of one takes a hash, and every request has two."""


class Tenancy:
    """The tenants of one engine."""

    def __init__(
        self,
        adapters: Adapters,
        memory: Memory,
        holdings: Holdings,
        book: ReaderBook,
        lock: RLock,
        *,
        prior_weights: str | None,
    ) -> None:
        """Make one.

        Args:
            prior_weights: digest of the weights that the prior in `book` holds for; None: there is no prior.
        """
        self._adapters = adapters
        self._namespace = lru_cache(MAX_NAMES)(adapters.namespace)
        self._home = lru_cache(MAX_NAMES)(adapters.home)
        self._memory = memory
        self._holdings = holdings
        self._book = book
        self._lock = lock
        self._prior_weights = prior_weights
        self._cached_pages: dict[str, int] = {}  # quotas, by tenant

    def namespace(self, weights: Weights, tenant: str) -> str:
        """Where a tenant's KV of these weights is cached; raises InvalidRequest for a tenant that is no text."""
        namespace = self._namespace(weights.digest, values.text("the tenant", tenant))
        if weights.digest == self._prior_weights:
            with self._lock:
                self._book.admit_prior(namespace)
        if tenant in self._cached_pages:
            with self._lock:  # each adapter's namespace begins without a quota
                self._limit(namespace, self._cached_pages.get(tenant))
        return namespace

    def namespaces(self, tenant: str) -> tuple[str, ...]:
        """A tenant's namespaces with every adapter, the one with none named first; as of when somebody last looked."""
        return self._adapters.namespaces(tenant)

    def home(self, tenant: str) -> str:
        """What a tenant's quotas go by, whatever the weights are: its first namespace.

        Raises:
            InvalidRequest: the tenant is no text.
        """
        return self._home(values.text("the tenant", tenant))

    def set_quota(self, tenant: str, *, cached_tokens: int | None, held_tokens: int | None) -> None:
        """See `Cache.set_quota`."""
        page_size = self._memory.pool.page_size
        cached_tokens, held_tokens = _limit("cached_tokens", cached_tokens), _limit("held_tokens", held_tokens)
        with self._lock:
            num_pages = None if cached_tokens is None else cached_tokens // page_size
            self._cached_pages.pop(tenant, None)
            if num_pages is not None:
                self._cached_pages[tenant] = num_pages
            for namespace in self.namespaces(tenant):
                self._limit(namespace, num_pages)
            self._holdings.set_quota(self.home(tenant), None if held_tokens is None else held_tokens // page_size)

    def _limit(self, namespace: str, num_pages: int | None) -> None:
        if self._memory.tree.usage(namespace).quota_pages != num_pages:
            self._memory.tree.set_quota(namespace, num_pages)
            num_bytes = None if num_pages is None else num_pages * self._memory.pool.page_bytes
            self._memory.renditions.set_budget(namespace, num_bytes)


def _limit(name: str, value: int | None) -> int | None:
    limit = None if value is None else values.whole_number(name, value)
    if limit is not None and limit < 0:
        raise InvalidRequest(f"{name} must be None (no limit) or 0 or more, not {limit}")
    return limit
