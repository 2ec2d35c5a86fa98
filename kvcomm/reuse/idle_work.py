"""What an engine does beside requests: audit, learn, repair, measure.

A job is a generator that yields between forward passes, so that an arriving request waits for one pass at most. Jobs
run on the engine's thread: first those somebody waits for, then what the next request is quicker for, then audits,
which the bound depends on, then studies, those first that bring a reader to its next level soonest. Audits of what is
not accepted any more can wait for studies. Studies are bounded in number; the one that pays latest goes first.
A job holds references on the pages it needs and gives them back however it ends. A job that fails is logged, counted
and forgotten: nobody waits for it, and no request depends on it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from inspect import GEN_CREATED, getgeneratorstate
from threading import RLock

from kvcomm.errors import PoolExhausted, WeightsChanged
from kvcomm.memory.pool import PageIds

logger = logging.getLogger("kvcomm.study")

Steps = Generator[None, None, None]

MAX_STUDIES = 64
"""Kept waiting; each holds the pages of a prompt."""


class Urgency(IntEnum):
    """Which jobs come first."""

    AWAITED = 0
    """Somebody waits for it."""
    AHEAD = 1
    """The next request may be quicker for it; it is soon done."""
    AUDIT = 2
    """The bound depends on it."""
    STUDY = 3
    """Nobody misses it if it is dropped."""


@dataclass(eq=False)
class Job:
    """Work beside requests.

    Attributes:
        steps: does it, pass by pass.
        release: gives back what the job holds; called once, however it ends, under the engine's lock.
        pages: the page references it holds, for integrity checks.
        pays_after: further jobs like it that it takes until it pays; the fewer, the sooner it is done.
        can_wait: whether it is no more urgent than a study now. Called under the engine's lock.
    """

    steps: Steps
    release: Callable[[], None]
    pages: Callable[[], Iterable[PageIds]]
    urgency: Urgency = Urgency.STUDY
    pays_after: float = math.inf
    can_wait: Callable[[], bool] = lambda: False


class IdleWork:
    """Jobs of one engine. Added from any thread under the engine's lock; worked on by one.

    Attributes:
        jobs: those that are not done yet. Whether there are any may be asked without the lock.
        worked_s: seconds that jobs have taken.
        when_added: wakes whoever works on jobs; must not take the engine's lock.
    """

    def __init__(self, lock: RLock) -> None:
        self.when_added: Callable[[], None] = lambda: None
        self._lock = lock
        self.jobs: list[Job] = []
        self._begun: Job | None = None
        self._running: Job | None = None
        self._is_closed = False
        self.worked_s = 0.0

    def add(self, job: Job) -> None:
        """Queue a job; of too many studies the one that pays latest is dropped."""
        with self._lock:
            self.jobs.append(job)
            if self._is_closed:
                self._remove(job)
            elif len(list(self._droppable())) > MAX_STUDIES:
                self._drop()
        self.when_added()

    def step(self) -> float:
        """Work on the first job until it yields or ends; returns the seconds it took."""
        begun_s = time.perf_counter()
        with self._lock:
            if not self.jobs:
                return 0.0
            # What has begun is finished before its like: its passes so far are in vain otherwise.
            job = min(self.jobs, key=lambda each: (_urgency(each), each is not self._begun, each.pays_after))
            self._begun = self._running = job
        ended = True
        try:
            next(job.steps)
            ended = False
        except StopIteration:
            pass
        except (PoolExhausted, WeightsChanged) as error:
            logger.info("idle work was given up: %s", error)
        except Exception:
            # A request must never suffer from it; whoever waits for it has been told.
            level = logging.DEBUG if job.urgency is Urgency.AWAITED else logging.ERROR
            logger.log(level, "idle work failed", exc_info=True)
        took_s = time.perf_counter() - begun_s
        with self._lock:
            self.worked_s += took_s  # before the job is gone: whoever waits for that sees what it took
            self._running = None
            if (ended or self._is_closed) and job in self.jobs:
                self._remove(job)
        return took_s

    def give_way(self) -> bool:
        """Drop the study that pays latest, so that its pages come free; False if there is none."""
        with self._lock:
            return self._drop()

    def droppable_pages(self) -> list[PageIds]:
        """Page references of the jobs that would give way."""
        with self._lock:
            return [pages for job in self._droppable() for pages in job.pages()]

    def holds_on(self) -> bool:
        """Whether a job holds pages that come free only when it is done.

        Studies give way, but for those that have begun: these hold more pages than they name.
        """
        with self._lock:
            return any(_holds_on(job) and any(map(len, job.pages())) for job in self.jobs)

    def close(self) -> None:
        """Drop every job; one in the middle of a pass behind that."""
        with self._lock:
            self._is_closed = True
            for job in list(self.jobs):
                if job is not self._running:
                    self._remove(job)

    def pages_held(self) -> Iterator[PageIds]:
        """Page references of all jobs."""
        for job in self.jobs:
            yield from job.pages()

    def _drop(self) -> bool:
        job = max(self._droppable(), key=lambda each: each.pays_after, default=None)
        if job is None:
            return False
        self._remove(job)
        return True

    def _droppable(self) -> Iterator[Job]:
        """Studies, oldest first, but for one in the middle of a pass."""
        return (job for job in self.jobs if job.urgency is Urgency.STUDY and job is not self._running)

    def _remove(self, job: Job) -> None:
        self.jobs.remove(job)
        job.steps.close()
        job.release()


def _holds_on(job: Job) -> bool:
    return job.urgency is not Urgency.STUDY or getgeneratorstate(job.steps) != GEN_CREATED


def _urgency(job: Job) -> Urgency:
    return max(job.urgency, Urgency.STUDY) if job.can_wait() else job.urgency
