"""What a tier costs: seconds by bytes, measured with every operation, and whether asking it is worth the time.

The cost of n bytes is a latency and a time per byte, each a running mean over ratios. A measurement that is far from
what was expected is believed at once, in either direction: a tier that has become slow is left alone from its first
slow operation on. Whoever is left alone is asked again by one caller at a time, after rests that grow; one good answer
brings it back. Pure logic over a clock; safe to use from several threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Lock

WORTH_SHARE = 0.7
"""Of the seconds of computing that an operation may be expected to take."""
SMALL_BYTES = 64 * 2**10
"""Operations up to this size say what the latency is, larger ones what a byte costs."""
SURPRISE = 4.0
"""Ratio of a measurement to what was expected from which on it is believed at once."""
WEIGHT = 0.25
"""Of a measurement that is no surprise, on a logarithmic scale."""
FIRST_REST_S = 1.0
MAX_REST_S = 60.0


class Pace:
    """The cost of one kind of operation of one tier."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that never go back."""
        self._clock = clock
        self._lock = Lock()
        self._latency_s: float | None = None
        self._byte_s: float | None = None
        self._is_failing = False
        self._rest_s = FIRST_REST_S
        self._again_s: float | None = None  # when one caller may ask; None: it is not left alone

    @property
    def latency_s(self) -> float:
        """Seconds of an operation of no bytes; 0 as long as it is not known."""
        return self._latency_s or 0.0

    @property
    def byte_s(self) -> float:
        """Seconds for each byte; 0 as long as it is not known."""
        return self._byte_s or 0.0

    @property
    def is_failing(self) -> bool:
        """Whether the latest operation failed."""
        return self._is_failing

    def expected_s(self, num_bytes: int) -> float | None:
        """Seconds that so many bytes take; infinite as long as operations fail, None before the first one."""
        with self._lock:
            return self._expected_s(num_bytes)

    def is_worth(self, num_bytes: int, compute_s: float) -> bool:
        """Whether the tier should be asked for something that can be had by computing.

        Where it has been left alone for its rest, this says so to one caller, whose operation then tells more.

        Args:
            compute_s: seconds that it takes without the tier.
        """
        with self._lock:
            expected_s = self._expected_s(num_bytes)
            if expected_s is None or expected_s <= WORTH_SHARE * compute_s:
                self._rest_s, self._again_s = FIRST_REST_S, None
                return True
            return self._is_rested()

    def done(self, num_bytes: int, seconds: float) -> None:
        """An operation ended well."""
        with self._lock:
            self._is_failing = False
            self._learn(num_bytes, seconds)

    def late(self, num_bytes: int, seconds: float) -> None:
        """An operation has taken so long, and goes on."""
        with self._lock:
            expected_s = self._expected_s(num_bytes)
            if expected_s is None or expected_s < seconds:
                self._believe(num_bytes, seconds)

    def failed(self) -> None:
        """An operation failed: whatever is asked now is expected to fail too."""
        with self._lock:
            self._is_failing = True

    def _expected_s(self, num_bytes: int) -> float | None:
        if self._is_failing:
            return math.inf
        if self._byte_s is None and (self._latency_s is None or num_bytes > SMALL_BYTES):
            return None
        return (self._latency_s or 0.0) + (self._byte_s or 0.0) * num_bytes

    def _is_rested(self) -> bool:
        now = self._clock()
        if self._again_s is None:
            self._again_s = now + self._rest_s
            return False
        if now < self._again_s:
            return False
        self._rest_s = min(2 * self._rest_s, MAX_REST_S)
        self._again_s = now + self._rest_s
        return True

    def _learn(self, num_bytes: int, seconds: float) -> None:
        if num_bytes <= SMALL_BYTES:
            self._latency_s = _mixed(self._latency_s, seconds)
            return
        if self._latency_s is not None:
            self._latency_s = min(self._latency_s, seconds)  # a part of it cannot have taken longer
        self._byte_s = _mixed(self._byte_s, self._per_byte_s(num_bytes, seconds))

    def _believe(self, num_bytes: int, seconds: float) -> None:
        if num_bytes <= SMALL_BYTES:
            self._latency_s = seconds
        else:
            self._byte_s = self._per_byte_s(num_bytes, seconds)

    def _per_byte_s(self, num_bytes: int, seconds: float) -> float:
        return max(seconds - (self._latency_s or 0.0), 0.0) / num_bytes


def _mixed(before: float | None, seconds: float) -> float:
    """A running geometric mean, given up where the new value is far from it."""
    if before is None or not before or not 1 / SURPRISE < seconds / before < SURPRISE:
        return seconds
    return math.exp((1 - WEIGHT) * math.log(before) + WEIGHT * math.log(seconds))
