"""An engine over a shared tier: what is read from it ahead of a request, and what is written to it behind one.

What passes here goes by the identity of the weights that computed it and the tenant it belongs to: exact prefixes in
whole runs of the tier, and renditions of segments, which are marked where they are approximate. Without a tier all of
this does nothing. Methods but `flush`, `stop_reading` and `close` are called under the engine's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from threading import RLock

from kvcomm.engine.adapters import Adapters
from kvcomm.engine.exchange import layer_shapes
from kvcomm.engine.passes import Work
from kvcomm.engine.read_ahead import ReadAhead
from kvcomm.engine.request import Request
from kvcomm.engine.write_behind import WriteBehind
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.live import Weights
from kvcomm.reuse.cost import ReuseCost
from kvcomm.reuse.plan import Part, Plan, Reason, plan_of
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import Tier, TierSpace
from kvcomm.values import text

CLOSE_S = 2.0
"""Seconds that closing an engine may take for what is still to be written."""

PRODUCER = "kvcomm"
"""Whose kernels compute the KV of an engine."""


class Tiering:
    """What the scheduler asks of a tier.

    Attributes:
        tier: None: there is none.
        is_on: whether there is one; where it is off, no request has anything to ask.
        space_of: whose KV it is that weights compute for a tenant.
    """

    def __init__(
        self,
        tier: Tier | None,
        memory: Memory,
        cost: ReuseCost,
        lock: RLock,
        *,
        space_of: Callable[[Weights, str], TierSpace],
        first_weights: Weights,
    ) -> None:
        """Make one.

        Args:
            space_of: whose KV it is that these weights compute for a tenant.
            first_weights: those that the model had when the engine was made.
        """
        self._first_weights = first_weights
        self.tier = tier
        self.is_on = tier is not None
        self._lock = lock
        self.space_of = space_of
        self._spaces: dict[str, TierSpace] = {}  # by namespace
        self._reads = None if tier is None else ReadAhead(tier, memory, cost, lock)
        self._writes = None if tier is None else WriteBehind(tier, memory.pool, lock)

    def ask(self, request: Request) -> None:
        """Ask what the tier has of a request's prompt, and, where text may be moved, of its segments."""
        if self._reads is not None:
            space, tokens = self._space(request), request.sequence.token_ids[:-1]
            self._spaces[request.namespace] = space
            segments = request.segments if request.may_move else ()
            request.ask = self._reads.ask(request.namespace, space, tokens, segments)

    def computed(self, batch: Iterable[Work], seconds: float) -> None:
        """A pass has taken so long."""
        if self._reads is not None:
            runs = [run for work in batch for run in work.runs]
            self._reads.computed([(run.start, run.end) for run in runs], seconds)

    def must_wait(self, request: Request) -> bool:
        """Whether a request should rather wait for the tier than be computed now."""
        return self._reads is not None and request.ask is not None and self._reads.must_wait(request.ask)

    def rest(self, waiting: Iterable[Request]) -> None:
        """Where all who wait do so for the tier: wait for it, with the engine's lock given back meanwhile."""
        due_s = [-1.0 if request.ask is None else request.ask.waits_until_s for request in waiting]
        if self._reads is not None and due_s and min(due_s) > time.monotonic():
            self._reads.rest(min(due_s))

    def wake(self) -> None:
        """Something has changed that those who rest should see."""
        if self._reads is not None:
            self._reads.wake()

    def has_news(self, request: Request) -> bool:
        """Whether the tier has given more of a prompt than counts as computed yet."""
        ask, sequence = request.ask, request.sequence
        return ask is not None and ask.namespace == request.namespace and ask.num_placed > sequence.num_computed

    def num_next(self, request: Request, start: int, end: int) -> int:
        """How much of `[start, end)` to compute before looking again whether the tier has given more."""
        if self._reads is None or request.ask is None:
            return end - start
        return self._reads.num_next(request.ask, start, end)

    def plan(self, request: Request, otherwise: Reason) -> Plan:
        """Compute all behind the exact prefix: what the tier would have had for the reason that it was not had."""
        ask, num_reused, num_tokens = request.ask, request.sequence.num_computed, request.sequence.num_tokens
        num_missed = num_reused
        if ask is not None and ask.num_there is not None and (ask.reason is not None or not ask.is_settled):
            num_missed = min(num_tokens, max(num_reused, ask.num_there))
        reason = (None if ask is None else ask.reason) or Reason.TIER_SLOW
        parts = [Part(num_reused, num_missed, reason)] if num_missed > num_reused else []
        return plan_of(num_reused, [*parts, Part(num_missed, num_tokens, otherwise)])

    def is_computed(self, request: Request) -> None:
        """A request needs nothing more of its prompt."""
        if self._reads is not None and request.ask is not None:
            self._reads.give_up(request.ask)

    def remember(self, request: Request, sequence: KVSequence, num_tokens: int, pages: PageIds) -> None:
        """Let the tier have the first tokens of a sequence, which are exact."""
        if self._writes is not None and self._writes.num_whole(num_tokens) > request.num_offered:
            request.num_offered = self._writes.num_whole(num_tokens)
            self._writes.offer(self._space(request), sequence.token_ids[: request.num_offered], pages)

    def published(self, namespace: str, segment: Segment, rendition: Rendition) -> None:
        """Let the tier have a new rendition."""
        if self._writes is not None and (space := self._spaces.get(namespace)) is not None:
            self._writes.offer_rendition(space, segment, rendition)

    def give_way(self) -> bool:
        """Drop something that waits to be written, so that its pages may come free; False if there is nothing."""
        return self._writes is not None and self._writes.give_way()

    def droppable_pages(self) -> list[PageIds]:
        """Page references that `give_way` would give back, sooner or later."""
        return [] if self._writes is None else self._writes.droppable_pages()

    def pages_held(self) -> Iterator[PageIds]:
        """Every page reference, for integrity checks."""
        if self._reads is not None and self._writes is not None:
            yield from self._reads.pages_held()
            yield from self._writes.pages_held()

    def home_space(self, tenant: str = DEFAULT_TENANT) -> TierSpace:
        """What a tenant's snapshots and the like go by in the tier, whatever the weights become.

        Raises:
            InvalidRequest: the tenant is no text.
        """
        return self.space_of(self._first_weights, text("the tenant", tenant))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the tier has what was computed so far; False after `timeout_s`. Closing does so for 2 s."""
        return self._writes is None or self._writes.flush(timeout_s)

    def stop_reading(self) -> None:
        """Nobody waits for the tier any more."""
        if self._reads is not None:
            self._reads.close()

    def close(self) -> None:
        """Write what is left, as far as that takes no long time, and end. The tier stays open."""
        self.stop_reading()
        if self._writes is not None:
            self._writes.close(CLOSE_S)

    def _space(self, request: Request) -> TierSpace:
        return self.space_of(request.weights, request.tenant)


def tier_space(adapters: Adapters, geometry: ModelGeometry, weights: Weights, tenant: str) -> TierSpace:
    """Whose KV it is that these weights compute for a tenant, where processes share it."""
    return TierSpace(
        namespace=adapters.identity(weights),
        producer=PRODUCER,
        tenant=tenant,
        shapes=tuple(layer_shapes(geometry)),
        dtype=geometry.dtype,
        vocab_size=geometry.vocab_size,
    )
