"""Writing to a tier off the critical path: a bounded queue, one thread, and a budget of time.

Whoever gives work also gives what is to be called when it has ended: written, dropped or left at the end, it is called
exactly once, so that pages which were held for it are given back. The queue is bounded by items and bytes; what comes
when it is full is dropped, as what waits is nearer to being written. Work of a name that waits already is dropped too.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from threading import Condition, Thread
from typing import NamedTuple

from kvcomm.errors import KVCommError

logger = logging.getLogger(__name__)

MAX_ITEMS = 256
MAX_BYTES = 2**30
SHARE = 0.25
"""Of the time since the queue was made that its thread may work."""
LOAN_S = 5.0
"""Seconds of work that it may do beforehand."""


class Dropped(StrEnum):
    """Why something is not written."""

    NOTHING = "nothing"
    FULL = "full"
    SAME = "same"
    CLOSED = "closed"
    FAILED = "failed"


class WriteTask(NamedTuple):
    """Something to write.

    Attributes:
        name: of which only one may wait.
        num_bytes: that it keeps in memory until it is written.
        write: does it.
        ended: called once whatever becomes of it.
    """

    name: str
    num_bytes: int
    write: Callable[[], object]
    ended: Callable[[], object]


class WorkBudget:
    """A share of the time that goes by, with a loan at the beginning. Used by one thread."""

    def __init__(self, share: float, loan_s: float, clock: Callable[[], float]) -> None:
        """Make one.

        Args:
            share: of the time, in (0, 1].
            loan_s: seconds of work that are free at any time after a long enough rest.
        """
        self._share = share
        self._loan_s = loan_s
        self._clock = clock
        self._left_s = loan_s
        self._seen_s = clock()

    def wait_s(self) -> float:
        """Seconds until there is time for more."""
        self._earn()
        return max(-self._left_s, 0.0) / self._share

    def worked(self, seconds: float) -> None:
        """Time was spent."""
        self._earn()
        self._left_s -= seconds

    def _earn(self) -> None:
        now = self._clock()
        self._left_s = min(self._left_s + (now - self._seen_s) * self._share, self._loan_s)
        self._seen_s = now


class WriteQueue:
    """The queue and its thread. Safe to use from several threads."""

    def __init__(
        self,
        *,
        max_items: int = MAX_ITEMS,
        max_bytes: int = MAX_BYTES,
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one.

        Args:
            max_items, max_bytes: that may wait, including what is being written.
            share: of the time that the thread may work.
        """
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._budget = WorkBudget(share, LOAN_S, clock)
        self._clock = clock
        self._changed = Condition()
        self._waiting: deque[WriteTask] = deque()
        self._names: set[str] = set()
        self._num_bytes = 0
        self._dropped: Counter[Dropped] = Counter()
        self._thread: Thread | None = None
        self._is_closing = False
        self._until_s = float("inf")

    @property
    def num_waiting(self) -> int:
        """Items that wait or are being written."""
        return len(self._names)

    @property
    def num_bytes(self) -> int:
        """That they keep in memory."""
        return self._num_bytes

    def dropped(self) -> dict[str, int]:
        """How often something was not written, by reason."""
        with self._changed:
            return {reason.value: count for reason, count in self._dropped.items()}

    def add(self, work: WriteTask) -> Dropped | None:
        """Take something to be written; returns why not, if so, after `ended` was called."""
        with self._changed:
            reason = self._refusal(work)
            if reason is None:
                self._waiting.append(work)
                self._names.add(work.name)
                self._num_bytes += work.num_bytes
                self._start()
                self._changed.notify_all()
                return None
            self._dropped[reason] += 1
        work.ended()
        return reason

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing waits any more; False: something still does after `timeout_s` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._names, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what waits, without regard to the budget, and end; what is left after `timeout_s` seconds is dropped.

        A write that hangs is left to itself: its thread ends with the process.
        """
        with self._changed:
            self._is_closing = True
            self._until_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._drop_waiting()

    def _refusal(self, work: WriteTask) -> Dropped | None:
        if self._is_closing:
            return Dropped.CLOSED
        if work.name in self._names:
            return Dropped.SAME
        if len(self._names) >= self._max_items or self._num_bytes + work.num_bytes > self._max_bytes:
            return Dropped.FULL
        return None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name="kvcomm-tier-writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            start_s = self._clock()
            self._do(work)
            self._budget.worked(self._clock() - start_s)

    def _next(self) -> WriteTask | None:
        """The next work, once there is time for it; None: the end."""
        with self._changed:
            while True:
                if self._is_closing:
                    is_over = not self._waiting or time.monotonic() >= self._until_s
                    return None if is_over else self._waiting.popleft()
                wait_s = self._budget.wait_s()
                if self._waiting and wait_s <= 0:
                    return self._waiting.popleft()
                self._changed.wait(wait_s if self._waiting else None)

    def _do(self, work: WriteTask) -> None:
        is_written = False
        try:
            work.write()
            is_written = True
        except (KVCommError, OSError, MemoryError) as error:
            logger.warning("%s is not written to the tier: %s", work.name, error)
        except Exception:  # a fault of ours must not end the thread, for which others wait
            logger.exception("%s is not written to the tier", work.name)
        finally:
            self._forget(work, None if is_written else Dropped.FAILED)
            work.ended()

    def _forget(self, work: WriteTask, reason: Dropped | None) -> None:
        with self._changed:
            self._names.discard(work.name)
            self._num_bytes -= work.num_bytes
            if reason is not None:
                self._dropped[reason] += 1
            self._changed.notify_all()

    def _drop_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                work = self._waiting.popleft()
            self._forget(work, Dropped.CLOSED)
            work.ended()
