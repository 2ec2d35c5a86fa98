"""What one engine keeps for later requests, as its users and operators see it and steer it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from threading import RLock
from typing import NamedTuple

from kvcomm.engine.encoding import PromptReader
from kvcomm.engine.holdings import Holdings, num_distinct
from kvcomm.engine.tenancy import Tenancy
from kvcomm.memory.events import CacheEvent
from kvcomm.memory.memory import Memory
from kvcomm.memory.node import Drop
from kvcomm.memory.renditions import SegmentView
from kvcomm.memory.segments import Prompt, token_ids_of
from kvcomm.memory.tree import NamespaceUsage, NodeView
from kvcomm.model.live import Weights
from kvcomm.tiers.space import DEFAULT_TENANT


class MemoryStats(NamedTuple):
    """Pages of the pool: free ones, and those the tree, contexts and requests refer to (one page may be in several)."""

    num_pages: int
    num_free: int
    num_cached: int
    num_in_contexts: int
    num_in_requests: int
    page_bytes: int
    bytes_copied: int


class Cache:
    """The cache of one engine. Thread-safe.

    Attributes:
        page_size: token slots of a page.
        num_pages: of the pool.
        page_bytes: of one page, all layers together.
        ages: how long pages lived and lay unused.
    """

    def __init__(
        self,
        memory: Memory,
        holdings: Holdings,
        tenancy: Tenancy,
        reader: PromptReader,
        lock: RLock,
        weights_of: Callable[[str | None], Weights],
    ) -> None:
        """Make one.

        Args:
            weights_of: what requests with an adapter, or with none, compute with now.
        """
        self._memory = memory
        self._holdings = holdings
        self._tenancy = tenancy
        self._reader = reader
        self._lock = lock
        self._weights_of = weights_of
        pool = memory.pool
        self.page_size, self.num_pages, self.page_bytes = pool.page_size, pool.num_pages, pool.page_bytes
        self.ages = memory.tree.ages

    def num_cached(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Leading tokens of a prompt whose KV is cached; looking does not count as use."""
        token_ids, namespace = self._read(prompt, adapter, tenant)
        with self._lock:
            return self._memory.tree.peek(namespace, token_ids)

    def pin(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Keep the cached part of a prompt from eviction and TTL; returns how many tokens that is."""
        token_ids, namespace = self._read(prompt, adapter, tenant)
        with self._lock:
            return self._memory.tree.pin(namespace, token_ids)

    def unpin(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Undo one `pin`; returns how many tokens it concerned."""
        token_ids, namespace = self._read(prompt, adapter, tenant)
        with self._lock:
            return self._memory.tree.unpin(namespace, token_ids)

    def clear(self, *, tenant: str | None = None) -> None:
        """Drop cached prefixes, of one tenant or of all; contexts keep what they refer to."""
        with self._lock:
            for namespace in (None,) if tenant is None else self._tenancy.namespaces(tenant):
                self._memory.reset(namespace)

    def set_quota(
        self, *, cached_tokens: int | None = None, held_tokens: int | None = None, tenant: str = DEFAULT_TENANT
    ) -> None:
        """Limit a tenant; None is no limit, and each call sets both.

        Args:
            cached_tokens: of its cached prefixes, and of the renditions of its segments, with each adapter; over it the
                tenant's own least recently used ones are dropped, never those of others.
            held_tokens: of its contexts and requests in flight at once; over it requests are refused (QuotaExceeded).

        Raises:
            InvalidRequest: a limit that is no whole number, or negative.
        """
        self._tenancy.set_quota(tenant, cached_tokens=cached_tokens, held_tokens=held_tokens)

    def stats(self) -> MemoryStats:
        """Where the pages are."""
        with self._lock:
            # First: these give forgotten pages back.
            in_contexts, in_requests = self._holdings.pages_in_contexts(), self._holdings.pages_in_requests()
            pool = self._memory.pool
            return MemoryStats(
                num_pages=pool.num_pages,
                num_free=pool.num_free,
                num_cached=num_distinct(self._memory.tree.pages_held()),
                num_in_contexts=num_distinct(in_contexts),
                num_in_requests=num_distinct(in_requests),
                page_bytes=pool.page_bytes,
                bytes_copied=pool.bytes_copied,
            )

    def unchanged(self) -> AbstractContextManager[object]:
        """Within, nothing of it changes but by whoever is within: for looks at several things at once."""
        return self._lock

    def usage(self, namespace: str) -> NamespaceUsage:
        """What a namespace has cached, and what became of its tokens so far."""
        with self._lock:
            return self._memory.tree.usage(namespace)

    def total_usage(self) -> NamespaceUsage:
        """The same of all namespaces together."""
        with self._lock:
            return self._memory.tree.total_usage()

    def recent_drops(self, namespace: str) -> list[tuple[float, Drop]]:
        """What was dropped lately, and how many seconds ago, the latest first."""
        with self._lock:
            return self._memory.tree.recent_drops(namespace)

    def prefixes(self, namespace: str) -> Iterator[NodeView]:
        """Cached prefixes, parents before children; to be looked at within `unchanged`."""
        return self._memory.tree.walk(namespace)

    def segments(self, namespace: str) -> Iterator[SegmentView]:
        """Segments that have renditions; to be looked at within `unchanged`."""
        return self._memory.renditions.views(namespace)

    def prolong(self, namespace: str, token_ids: Sequence[int], ttl_s: float) -> None:
        """Let what is cached of these tokens live so long from now on, unless its pages are needed."""
        with self._lock:
            match = self._memory.tree.match(namespace, token_ids)
            self._memory.tree.insert(namespace, token_ids[: match.num_tokens], match.pages, ttl_s=ttl_s)

    @property
    def has_events(self) -> bool:
        """Whether anything was cached or dropped since events were last taken."""
        return self._memory.tree.has_events

    def take_events(self) -> list[CacheEvent]:
        """What was cached and dropped since the last time, in order."""
        with self._lock:
            return self._memory.tree.take_events()

    def begin_events(self) -> list[CacheEvent]:
        """All that is cached now, as events; what happened before is taken with it."""
        with self._lock:
            self._memory.tree.take_events()
            return self._memory.tree.all_stored()

    def _read(self, prompt: Prompt, adapter: str | None, tenant: str) -> tuple[list[int], str]:
        """Token ids of a prompt, and where its KV is cached."""
        token_ids = token_ids_of(self._reader.read(prompt, is_start=True))
        return token_ids, self._tenancy.namespace(self._weights_of(adapter), tenant)
