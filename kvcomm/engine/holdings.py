"""Who holds pages besides the cache: contexts and requests in flight, tenant by tenant.

A context that its user forgot is not a leak: when it is garbage-collected its sequence is put aside and given back at
the next occasion, because a collector may run at any moment, also in the middle of somebody's bookkeeping. All methods
but that one are called under the engine's lock.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.request import Request
from kvcomm.errors import QuotaExceeded
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.sequences import KVSequence


class _Held(NamedTuple):
    sequence: KVSequence
    namespace: str
    finalizer: weakref.finalize[[KVSequence], object] | None = None


class Holdings:
    """Living contexts, and the pages that they and the requests in flight refer to.

    Attributes:
        quota_pages: what the namespaces that have a limit may refer to at once. Nothing else is limited.
    """

    def __init__(
        self,
        pool: PagePool,
        requests: Callable[[], list[Request]],
        open_prompts: Callable[[], ReadAlong],
    ) -> None:
        """Make one.

        Args:
            requests: lists the requests in flight.
            open_prompts: of the engine.
        """
        self._pool = pool
        self._requests = requests
        self._open_prompts = open_prompts
        self._held: dict[int, _Held] = {}  # by id of the sequence
        self._forgotten: deque[KVSequence] = deque()
        self.quota_pages: dict[str, int] = {}

    @property
    def sequences(self) -> list[KVSequence]:
        """Sequences of contexts."""
        self.reclaim()
        return [held.sequence for held in self._held.values()]

    def hold(self, sequence: KVSequence, namespace: str) -> None:
        """A sequence is being filled; it becomes a context's, or is let go."""
        self._held[id(sequence)] = _Held(sequence, namespace)

    def let_go(self, sequence: KVSequence) -> None:
        """A sequence that was being filled is given up."""
        self._held.pop(id(sequence), None)

    def add(self, owner: object, sequence: KVSequence, namespace: str) -> None:
        """A context has been made; where its user forgets it, its sequence is given back."""
        self.reclaim()
        finalizer = weakref.finalize(owner, self._forgotten.append, sequence)
        self._held[id(sequence)] = _Held(sequence, namespace, finalizer)

    def drop(self, sequence: KVSequence) -> None:
        """A context has been released."""
        held = self._held.pop(id(sequence))
        if held.finalizer is not None:
            held.finalizer.detach()

    def set_quota(self, namespace: str, num_pages: int | None) -> None:
        """Limit what a namespace's contexts and requests may refer to at once; None lifts the limit."""
        self.quota_pages.pop(namespace, None)
        if num_pages is not None:
            self.quota_pages[namespace] = num_pages

    def require_quota(self, namespace: str, num_wanted: int, *, num_held: int) -> None:
        """Raises QuotaExceeded when a request for `num_wanted` pages does not fit its namespace's quota.

        Args:
            num_held: of these, pages that are held already, and so count anyway.
        """
        quota = self.quota_pages.get(namespace)
        if quota is None:
            return
        held = num_distinct(pages for owner, pages in self._all_pages() if owner == namespace)
        wanted = max(0, num_wanted - num_held)
        if held + wanted > quota:
            raise QuotaExceeded(
                f"this needs {wanted} more pages of {self._pool.page_size} tokens; the tenant's contexts and requests "
                f"hold {held} of its {quota}: release contexts, wait for requests, or raise the quota"
            )

    def pages_in_contexts(self) -> list[PageIds]:
        """Page tables of contexts."""
        return [sequence.pages for sequence in self.sequences]

    def pages_in_requests(self) -> list[PageIds]:
        """Page tables of requests that no context lent, and of open prompts."""
        return [sequence.pages for _, sequence in self._own_sequences()]

    def _all_pages(self) -> list[tuple[str, PageIds]]:
        self.reclaim()
        in_contexts = [(held.namespace, held.sequence.pages) for held in self._held.values()]
        return in_contexts + [(namespace, sequence.pages) for namespace, sequence in self._own_sequences()]

    def _own_sequences(self) -> list[tuple[str, KVSequence]]:
        own = {
            id(branch.sequence): (request.owner, branch.sequence)
            for request in self._requests()
            for branch in request.branches
        }
        in_requests = [entry for key, entry in own.items() if key not in self._held]
        twins = [(each.owner, each.healing.twin) for each in self._requests() if each.healing is not None]
        return [*in_requests, *twins, *self._open_prompts().sequences()]

    def reclaim(self) -> None:
        """Give back what forgotten contexts and open prompts held."""
        self._open_prompts().reclaim()
        while self._forgotten:
            sequence = self._forgotten.popleft()
            del self._held[id(sequence)]
            sequence.release()


def num_distinct(tables: Iterable[PageIds]) -> int:
    """Distinct pages in page tables."""
    return len({page for pages in tables for page in pages.tolist()})
