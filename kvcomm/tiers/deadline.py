"""Waiting for a read no longer than a deadline; the read itself goes on, so that its time is learned."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_LATE = 8
"""Reads that may go on behind their deadline; while there are so many nobody waits for another one."""


class _Read(Generic[T]):
    """One read: what it returned or raised."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: T | None = None
        self._error: BaseException | None = None
        self.ended = Event()
        self.is_late = False

    def run(self) -> None:
        """In its thread."""
        try:
            self._value = self._work()
        except BaseException as error:  # raised again where somebody waits
            self._error = error

    def result(self) -> T | None:
        """Once it has ended."""
        if self._error is not None:
            raise self._error
        return self._value


class LateReads:
    """Runs reads in threads of their own where they have a deadline. Safe to use from several threads."""

    def __init__(self, max_late: int = MAX_LATE) -> None:
        self._max_late = max_late
        self._lock = Lock()
        self._num_late = 0

    def within(self, deadline_s: float | None, work: Callable[[], T], late: Callable[[float], None]) -> T | None:
        """What `work` returns, which is never None; None: it has not come by the deadline.

        Args:
            deadline_s: seconds; None: wait in this thread as long as it takes.
            late: called with the seconds that were waited in vain.

        Raises:
            BaseException: what `work` raises before the deadline.
        """
        if deadline_s is None:
            return work()
        with self._lock:
            if self._num_late >= self._max_late:
                return None
        read = _Read(work)
        Thread(target=self._run, args=(read,), name="kvcomm-tier-read", daemon=True).start()
        start_s = time.monotonic()
        if not read.ended.wait(max(deadline_s, 0.0)) and self._becomes_late(read):
            late(time.monotonic() - start_s)
            return None
        return read.result()

    def _run(self, read: _Read[T]) -> None:
        read.run()
        with self._lock:
            read.ended.set()
            if read.is_late:
                self._num_late -= 1

    def _becomes_late(self, read: _Read[T]) -> bool:
        with self._lock:
            if read.ended.is_set():
                return False
            read.is_late = True
            self._num_late += 1
            return True
