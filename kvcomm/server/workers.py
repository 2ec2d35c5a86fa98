"""Turns: what tenants share one after the other, and the worker threads for what requests need beside the engine.

Reading bodies, rendering and tokenizing never run on the event loop, and little of it runs at a time: threads share one
interpreter. Long work has threads of its own, so that short work never waits behind it. Tenants take turns for those,
and for the engine: whoever sends much waits for itself. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter

from kvcomm.server.waiting import in_thread

T = TypeVar("T")

LONG_BYTES = 16_384
"""Of a body: reading it and what it asks for may take longer than ten milliseconds."""

NUM_SHORT, NUM_LONG = 4, 2
"""Threads; no more, or the event loop would have to wait for its turn among them."""

NUM_STARTING = 64
"""Threads that hand requests to the engine: they wait for its lock and compute nothing."""


class FairGate:
    """Lets in `limit` at a time; those who wait get in by turns of their tenants, whoever came first.

    Into the last few places a tenant gets only as long as it holds no more than it leaves free: so one tenant's long
    stays do not keep a second one waiting. Always holds: whoever waits may not enter now; a tenant stands in the queue
    only while it waits.
    """

    def __init__(self, limit: int, num_kept: Callable[[], int] = lambda: 0) -> None:
        """`num_kept`: the last few places, now."""
        self._limit = limit
        self._num_kept = num_kept
        self._inside: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_inside(self) -> int:
        """How many are inside."""
        return self._inside.total()

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait to be let in; out again at the end."""
        await self.enter(tenant)
        try:
            yield
        finally:
            self.leave(tenant)

    async def enter(self, tenant: str) -> None:
        """Wait to be let in; whoever was says `leave` once."""
        if tenant not in self._waiting and self._may_enter(tenant):
            self._inside[tenant] += 1
            return
        let_in = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(let_in)
        try:
            await let_in
        except asyncio.CancelledError:
            if let_in.cancelled():
                self._forget(tenant, let_in)
            else:  # it was let in at the same moment
                self.leave(tenant)
            raise

    def leave(self, tenant: str) -> None:
        """Out again: the next one's turn."""
        self._inside[tenant] -= 1
        if not self._inside[tenant]:
            del self._inside[tenant]
        while (following := next(filter(self._may_enter, self._waiting), None)) is not None:
            queue = self._waiting[following]
            let_in = queue.popleft()
            self._waiting.move_to_end(following)
            if not queue:
                del self._waiting[following]
            if not let_in.done():  # else its task has been cancelled and is about to notice
                self._inside[following] += 1
                let_in.set_result(None)

    def _may_enter(self, tenant: str) -> bool:
        num_free = self._limit - self.num_inside
        return num_free > self._num_kept() or self._inside[tenant] < num_free

    def _forget(self, tenant: str, let_in: asyncio.Future[None]) -> None:
        queue = self._waiting.get(tenant)
        if queue is not None and let_in in queue:
            queue.remove(let_in)
            if not queue:
                del self._waiting[tenant]


class Workers:
    """The threads of one server, and its way into the engine.

    Attributes:
        short, long: turns for work by its size.
        engine: turns for requests that the engine computes; those that wait outside are not in its queue.
    """

    def __init__(self, max_running: int, num_kept: Callable[[], int] = lambda: 0) -> None:
        """`max_running`: requests that the engine computes at the same time; `num_kept` of them for other tenants."""
        self.short = FairGate(NUM_SHORT)
        self.long = FairGate(NUM_LONG)
        self.engine = FairGate(max_running, num_kept)
        self._threads = CapacityLimiter(NUM_SHORT + NUM_LONG)
        self._starting = CapacityLimiter(NUM_STARTING)

    async def run(self, tenant: str, num_bytes: int, work: Callable[[], T]) -> T:
        """The result of work on a body of that size, once it is the tenant's turn."""
        gate = self.long if num_bytes >= LONG_BYTES else self.short
        async with gate.turn(tenant):
            return await in_thread(work, self._threads)

    async def start(self, work: Callable[[], T]) -> T:
        """The result of work that only waits for the engine."""
        return await in_thread(work, self._starting)
