"""The thread that drives the scheduler while there is work, and idle work while there is none, or beside it.

Where requests come without a pause, a share of the time goes to idle work, between steps in which answers are decoded:
a first token waits for it only when there is no other time. In a pause all of it goes there, beginning a moment after
the last request: agents of a team ask one after the other, and a pass for nobody would be what the next one waits for.
One thread for all forward passes: callers only queue requests and wait, so Ctrl-C in a caller never interrupts a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvcomm.engine.request import Request
from kvcomm.engine.scheduler import Scheduler
from kvcomm.errors import EngineClosed
from kvcomm.reuse.budget import Budget
from kvcomm.reuse.idle_work import IdleWork

READ_AFTER_S = 0.003
"""Seconds without any request before open prompts are read in whole chunks."""


class EngineLoop:
    """Starts with the first request, sleeps when idle, ends with `close`."""

    def __init__(self, scheduler: Scheduler, idle: IdleWork, budget: Budget, idle_after_s: float = 0.0) -> None:
        """Make one.

        Args:
            budget: of idle work while there are requests.
            idle_after_s: seconds without any request before idle work goes on without a budget.
        """
        self._scheduler = scheduler
        self._idle = idle
        self._budget = budget
        self._idle_after_s = idle_after_s
        self._busy_until = -float("inf")
        self._wake = threading.Condition()
        self._stepping = threading.Lock()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        idle.when_added = self.wake

    def submit(self, request: Request) -> None:
        """Queue a request and make sure somebody works on it.

        Raises:
            EngineClosed: the loop has been closed.
            PoolTooSmall: the request would not fit an empty pool.
        """
        self._scheduler.submit(request)
        self.wake()

    def wake(self) -> None:
        """Make sure somebody works on what there is."""
        with self._wake:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvcomm-engine", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until there is nothing to do, not even idle work; False after `timeout_s`."""
        with self._wake:
            return self._wake.wait_for(lambda: self._is_closing or not self._has_work, timeout_s)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin no step within; entered when none runs any more."""
        with self._stepping:
            yield

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._idle.jobs)

    def require_open(self) -> None:
        """Raises EngineClosed once `close` has been called."""
        if self._is_closing:
            raise _closed()

    def close(self) -> None:
        """Fail what is in flight, end the thread and wait for it. Idempotent."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._fail_all()

    def _fail_all(self) -> None:
        self._idle.close()
        self._scheduler.close(_closed())

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._has_work:
                    self._wake.notify_all()  # whoever waits for idleness
                # An open prompt that nobody adds to is given up when its time is over.
                open_prompts = self._scheduler.read_along
                due_s = open_prompts.next_due_s if open_prompts.readings else None
                self._wake.wait_for(lambda: self._is_closing or self._has_work, due_s)
                is_closing = self._is_closing
            if is_closing:
                self._fail_all()  # here, too: a second Ctrl-C may end whoever waits for this thread
                return
            try:
                if self._scheduler.has_requests:
                    with self._stepping:
                        self._serve()
                elif self._scheduler.read_along.has_work:
                    # Who has just got an answer asks the next agent at once: no chunk for nobody comes before that.
                    if not self._is_awaiting_request(READ_AFTER_S):
                        with self._stepping:
                            self._scheduler.step()
                elif self._idle.jobs and not self._is_awaiting_request(self._idle_after_s):
                    with self._stepping:
                        self._idle.step()
            except BaseException as error:
                # A broken invariant of our own: nobody may wait for ever, and no state is trusted any more.
                closed = EngineClosed(f"the engine stopped after an internal error: {error!r}")
                closed.__cause__ = error
                self._scheduler.close(closed)
                raise

    def _serve(self) -> None:
        """One step for requests, and if there is time left, one of idle work beside them."""
        begun_s = time.perf_counter()
        self._scheduler.step()
        self._budget.served_s += time.perf_counter() - begun_s
        if self._idle.jobs and (
            self._scheduler.awaits_jobs or self._budget.allows_more(self._scheduler.awaits_first_token)
        ):
            self._budget.learned(self._idle.step())
        self._busy_until = time.monotonic()

    def _is_awaiting_request(self, after_s: float) -> bool:
        """Wait until a request comes, or none has for so many seconds; True: there is a request, or the end."""
        with self._wake:
            left_s = self._busy_until + after_s - time.monotonic()
            return self._wake.wait_for(lambda: self._is_closing or self._scheduler.has_requests, max(0.0, left_s))


def _closed() -> EngineClosed:
    return EngineClosed("the engine is closed; create a new one")
