"""What the radix tree tells whoever mirrors it: a router, a dashboard, a test.

Events are recorded only after somebody asked for them once, and in a bounded buffer: a reader who stays away
too long gets one LOST event in place of what was dropped and has to start again from the tree itself. Events
carry tokens, never KV.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """What happened to a stretch of a token path."""

    STORED = "stored"
    REMOVED = "removed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Tokens [start, end) of one path of `namespace` entered or left the tree.

    `prefix_digest` is the hex SHA-256 of the int32 tokens [0, start) and tells equal stretches behind
    different prefixes apart. `reason` says why they left: evicted, expired, quota or reset. For LOST, `end -
    start` is the number of events dropped and everything else is empty.
    """

    kind: EventKind
    namespace: str
    start: int
    end: int
    token_ids: tuple[int, ...]
    prefix_digest: str
    reason: str | None = None


class EventLog:
    """Bounded buffer, off until the first `take`."""

    def __init__(self, max_events: int = 65_536) -> None:
        self.recording = False
        self._events: deque[CacheEvent] = deque(maxlen=max_events)
        self._num_lost = 0

    def record(self, event: CacheEvent) -> None:
        """Append `event`; the oldest one makes room and is counted as lost."""
        self._num_lost += len(self._events) == self._events.maxlen
        self._events.append(event)

    def take(self) -> list[CacheEvent]:
        """Everything since the last call, oldest first; the first call only switches recording on."""
        self.recording = True
        lost = [CacheEvent(EventKind.LOST, "", 0, self._num_lost, (), "")] if self._num_lost else []
        events = [*lost, *self._events]
        self._events.clear()
        self._num_lost = 0
        return events
