"""What the radix tree tells whoever mirrors it: a router, a dashboard, a test.

Events are recorded only after somebody asked for them once, and in a bounded buffer: a reader who stays away too long
gets one LOST event in place of what was dropped and has to start again from the tree itself (`RadixTree.all_stored`).
Events carry tokens, never KV.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from kvcomm.memory.node import NO_IDS, TokenIds

MAX_EVENTS = 65_536
"""That wait for a reader before what comes is lost."""


class EventKind(StrEnum):
    """What happened to a stretch of a token path."""

    STORED = "stored"
    REMOVED = "removed"
    LOST = "lost"


@dataclass(frozen=True, slots=True, eq=False)
class CacheEvent:
    """Tokens [start, end) of one path of `namespace` entered or left the tree.

    Attributes:
        path: all tokens of the path up to `end`, int32 [end]; nobody writes to it. So equal stretches behind different
            prefixes are told apart, and a reader needs no memory of what stands before.
        reason: why they left: evicted, expired, quota or reset.
        num_lost: of LOST, the number of events dropped; everything else is empty then.
    """

    kind: EventKind
    namespace: str = ""
    start: int = 0
    path: TokenIds = field(default_factory=NO_IDS.copy)
    reason: str | None = None
    num_lost: int = 0

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.path.size


class EventLog:
    """Bounded buffer, off until the first `take`."""

    def __init__(self, max_events: int = MAX_EVENTS, max_tokens: int = 2**24) -> None:
        """`max_tokens`: of the paths of all events together, four bytes each."""
        self.recording = False
        self._max_events = max_events
        self._max_tokens = max_tokens
        self._events: deque[CacheEvent] = deque()
        self._num_tokens = 0
        self._num_lost = 0

    @property
    def is_empty(self) -> bool:
        """Whether `take` would return nothing; may be asked for without any lock."""
        return not self._events and not self._num_lost

    def record(self, event: CacheEvent) -> None:
        """Append `event`; the oldest ones make room and are counted as lost."""
        self._events.append(event)
        self._num_tokens += event.end
        while len(self._events) > self._max_events or self._num_tokens > self._max_tokens:
            self._num_tokens -= self._events.popleft().end
            self._num_lost += 1

    def take(self) -> list[CacheEvent]:
        """Everything since the last call, oldest first; the first call only switches recording on."""
        self.recording = True
        lost = [CacheEvent(EventKind.LOST, num_lost=self._num_lost)] if self._num_lost else []
        events = [*lost, *self._events]
        self._events.clear()
        self._num_tokens = self._num_lost = 0
        return events
