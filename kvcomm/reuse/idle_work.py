"""What an engine does when it has nothing else to do: learn, calibrate, audit, repair, measure.

A job is a generator that yields between forward passes, so that an arriving request waits for one pass at most. Jobs
run on the engine's thread, in order, audits and measurements first; their number is bounded, the oldest study goes
first. A job holds references on the pages it needs and gives them back however it ends. A job that fails is logged,
counted and forgotten: nobody waits for it, and no request depends on it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from threading import RLock

from kvcomm.errors import PoolExhausted, WeightsChanged
from kvcomm.memory.pool import PageIds

logger = logging.getLogger("kvcomm.study")

Steps = Generator[None, None, None]

MAX_JOBS = 64
"""Studies kept waiting; each holds the pages of a prompt."""


@dataclass(eq=False)
class Job:
    """Work for idle time.

    Attributes:
        steps: does it, pass by pass.
        release: gives back what the job holds; called once, however it ends, under the engine's lock.
        pages: the page references it holds, for integrity checks.
        is_urgent: somebody waits for it, or the bound depends on it.
    """

    steps: Steps
    release: Callable[[], None]
    pages: Callable[[], Iterable[PageIds]]
    is_urgent: bool = False


class IdleWork:
    """Jobs of one engine. Added from any thread under the engine's lock; worked on by one."""

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self._jobs: deque[Job] = deque()
        self._current: Job | None = None
        self.num_done = 0
        self.num_failed = 0
        self.num_dropped = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would find anything to do."""
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        """Queue a job; too many, and the oldest one nobody waits for is dropped."""
        with self._lock:
            if job.is_urgent:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            waiting = list(self._droppable())
            if len(waiting) > MAX_JOBS:
                self._remove(waiting[0])
                self.num_dropped += 1

    def step(self) -> None:
        """Work on the first job until it yields or ends."""
        with self._lock:
            if not self._jobs:
                return
            job = self._current = self._jobs[0]
        try:
            next(job.steps)
        except StopIteration:
            self.num_done += 1
        except (PoolExhausted, WeightsChanged) as error:
            logger.info("idle work was given up: %s", error)
            self.num_failed += 1
        except Exception:
            # Nobody waits for a study, and a request must never suffer from one.
            logger.exception("idle work failed")
            self.num_failed += 1
        else:
            return
        finally:
            self._current = None
        with self._lock:
            if job in self._jobs:
                self._remove(job)

    def give_way(self) -> bool:
        """Drop the oldest job nobody waits for, so that its pages come free; False if there is none."""
        with self._lock:
            job = next(self._droppable(), None)
            if job is None:
                return False
            self._remove(job)
            self.num_dropped += 1
            return True

    def droppable_pages(self) -> list[PageIds]:
        """Page references of the jobs that would give way."""
        with self._lock:
            return [pages for job in self._droppable() for pages in job.pages()]

    def _droppable(self) -> Iterator[Job]:
        return (job for job in self._jobs if not job.is_urgent and job is not self._current)

    def close(self) -> None:
        """Drop every job."""
        with self._lock:
            for job in list(self._jobs):
                self._remove(job)

    def pages_held(self) -> Iterator[PageIds]:
        """Page references of all jobs."""
        for job in self._jobs:
            yield from job.pages()

    def _remove(self, job: Job) -> None:
        self._jobs.remove(job)
        job.steps.close()
        job.release()
