"""What a tier counts, and which of its objects it has seen."""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from kvcomm.plain import Plain
from kvcomm.tiers.pace import Pace
from kvcomm.tiers.space import TierMiss
from kvcomm.tiers.write_queue import WriteQueue

logger = logging.getLogger(__name__)

MAX_KNOWN = 65_536
KNOWN_S = 300.0
"""Seconds after which an object that was seen may be gone: others remove what is old."""


@dataclass(frozen=True)
class TierStats(Plain):
    """A tier as it has been used by one process.

    Attributes:
        kind, url: of the store.
        hits, read_bytes, read_s: objects that were read and right, their bytes and seconds.
        misses: by reason.
        puts, written_bytes, write_s: objects that were written, their bytes and seconds.
        unwritten: objects that could not be written.
        queued, queued_bytes: what waits to be written.
        dropped: what was not queued or not written, by reason.
        latency_s, read_byte_s, write_byte_s: what reading and writing is expected to cost.
        is_failing: whether the latest read or write failed.
        trouble: what the store said when something last failed; empty: nothing did.
    """

    kind: str
    url: str
    hits: int
    read_bytes: int
    read_s: float
    misses: dict[str, int]
    puts: int
    written_bytes: int
    write_s: float
    unwritten: int
    queued: int
    queued_bytes: int
    dropped: dict[str, int]
    latency_s: float
    read_byte_s: float
    write_byte_s: float
    is_failing: bool
    trouble: str


class Counts:
    """Counters of one tier. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._misses: Counter[TierMiss] = Counter()
        self._hits = self._puts = self._unwritten = 0
        self._read_bytes = self._written_bytes = 0
        self._read_s = self._write_s = 0.0
        self._trouble = ""

    def miss(self, reason: TierMiss) -> TierMiss:
        """Count a miss and return it."""
        with self._lock:
            self._misses[reason] += 1
        return reason

    def read(self, num_bytes: int, seconds: float) -> None:
        """An object was read and is right."""
        with self._lock:
            self._hits += 1
            self._read_bytes += num_bytes
            self._read_s += seconds

    def written(self, num_bytes: int, seconds: float) -> None:
        """An object was written."""
        with self._lock:
            self._puts += 1
            self._written_bytes += num_bytes
            self._write_s += seconds

    def unwritten(self) -> None:
        """An object could not be written."""
        with self._lock:
            self._unwritten += 1

    def trouble(self, error: Exception) -> None:
        """The store failed; said in the log once for each reason in a row."""
        with self._lock:
            is_known, self._trouble = self._trouble == str(error), str(error)
        if not is_known:
            logger.warning("the tier fails: %s", error)

    def damaged(self, key: str, reason: str) -> None:
        """An object cannot be used."""
        logger.warning("the tier's %s cannot be used and is removed: %s", key, reason)

    def stats(self, kind: str, url: str, reads: Pace, writes: Pace, queue: WriteQueue) -> TierStats:
        """Everything so far."""
        with self._lock:
            return TierStats(
                kind=kind,
                url=url,
                hits=self._hits,
                read_bytes=self._read_bytes,
                read_s=self._read_s,
                misses={reason.value: self._misses[reason] for reason in TierMiss if self._misses[reason]},
                puts=self._puts,
                written_bytes=self._written_bytes,
                write_s=self._write_s,
                unwritten=self._unwritten,
                queued=queue.num_waiting,
                queued_bytes=queue.num_bytes,
                dropped=queue.dropped(),
                latency_s=reads.latency_s,
                read_byte_s=reads.byte_s,
                write_byte_s=writes.byte_s,
                is_failing=reads.is_failing or writes.is_failing,
                trouble=self._trouble,
            )


class KnownKeys:
    """Names of objects that were seen lately. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float], max_known: int = MAX_KNOWN) -> None:
        self._clock = clock
        self._max_known = max_known
        self._lock = Lock()
        self._keys: OrderedDict[str, float] = OrderedDict()  # when they were seen

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return self._clock() - self._keys.get(key, -math.inf) < KNOWN_S

    def add(self, key: str) -> None:
        """Seen now."""
        with self._lock:
            self._keys[key] = self._clock()
            self._keys.move_to_end(key)
            if len(self._keys) > self._max_known:
                self._keys.popitem(last=False)

    def discard(self, key: str) -> None:
        """Gone, or not to be relied on."""
        with self._lock:
            self._keys.pop(key, None)
