"""Whose turn it is on the model: the host's steps (vLLM's) and the guest's passes (kvcomm's) never run at once.

They take turns in order of arrival, so each waits for at most one piece of the other's work. A pass for which a request
waits is urgent and always in order. Others, for learning, wait while the host is busy, but for a share of the time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IDLE_AFTER_S = 0.05
"""Seconds without a step of the host that has tokens before learning goes on without a budget."""


MIN_PROMPT = 32
"""Tokens of a step from which on its time says what a token of a prompt costs."""


class FairLock:
    """One lock, first come, first served. Thread-safe; not re-entrant."""

    def __init__(
        self, share: float = 0.1, idle_after_s: float = IDLE_AFTER_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make one.

        Args:
            share: of the time, for passes that are not urgent while the host is busy; in [0, 1).
        """
        self._share = share
        self._idle_after_s = idle_after_s
        self._clock = clock
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._num_urgent = 0
        self._busy_until_s = -float("inf")
        self._host_s = 0.0
        self._spare_s = 0.0
        self._token_s: float | None = None
        self._is_closed = False

    @contextmanager
    def host(self, num_tokens: int) -> Iterator[None]:
        """A step of the host that computes so many tokens; 0: it only looks round."""
        with self._turn():
            begun_s = self._clock()
            try:
                yield
            finally:
                if num_tokens:
                    self._busy_until_s = self._clock()
                    self._note(num_tokens, self._busy_until_s - begun_s)

    @contextmanager
    def guest(self) -> Iterator[None]:
        """A pass of the guest."""
        with self._condition:
            while not (self._num_urgent or self._is_closed or self._may_learn()):
                self._condition.wait(self._idle_after_s)
            is_spare = not self._num_urgent
        with self._turn():
            begun_s = self._clock()
            try:
                yield
            finally:
                if is_spare:
                    self._spare_s += self._clock() - begun_s

    def add_urgent(self, num: int) -> None:
        """So many more requests wait for passes; negative: fewer."""
        with self._condition:
            self._num_urgent += num
            assert self._num_urgent >= 0, self._num_urgent
            self._condition.notify_all()

    def close(self) -> None:
        """Let nobody wait for the host to be idle any more."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()

    @property
    def token_s(self) -> float | None:
        """Seconds that the host needs for a token of a prompt, of late; None: it has computed no prompt yet."""
        return self._token_s

    def _note(self, num_tokens: int, seconds: float) -> None:
        self._host_s += seconds
        if num_tokens >= MIN_PROMPT:
            paid_s = seconds / num_tokens
            self._token_s = paid_s if self._token_s is None else 0.8 * self._token_s + 0.2 * paid_s

    def _may_learn(self) -> bool:
        if self._clock() - self._busy_until_s >= self._idle_after_s:
            return True
        return self._spare_s <= self._share * self._host_s

    @contextmanager
    def _turn(self) -> Iterator[None]:
        mine = object()
        with self._condition:
            self._queue.append(mine)
            self._condition.wait_for(lambda: self._queue[0] is mine)
        try:
            yield
        finally:
            with self._condition:
                self._queue.popleft()
                self._condition.notify_all()
