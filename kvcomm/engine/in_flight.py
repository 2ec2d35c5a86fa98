"""Requests in flight: who waits, who runs, what pages they take from others, and how they end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from kvcomm.engine.healing_work import HealingWork
from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.request import Request
from kvcomm.engine.results import Completion
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import PoolExhausted
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.planner import Planner

logger = logging.getLogger("kvcomm.engine")


class GivesWay(Protocol):
    """Holds pages that requests come before."""

    def give_way(self) -> bool:
        """Give some of them back; False: there are none."""
        ...

    def droppable_pages(self) -> list[PageIds]:
        """Page references that `give_way` would give back, sooner or later."""
        ...


class InFlight:
    """The requests of one engine that have no result yet. Changed under the engine's lock only.

    What always holds: a request is in exactly one of waiting, running or settled; a settled request holds no pages
    except those of a sequence lent by a context.

    Attributes:
        waiting: not yet admitted, in order of arrival.
        running: admitted and not yet settled, in order of admission.
        awaits_jobs: nothing runs, and the first one that waits has room once jobs beside requests are done.
    """

    def __init__(
        self,
        memory: Memory,
        planner: Planner,
        *,
        tiering: Tiering,
        read_along: ReadAlong,
        healing: HealingWork,
        givers: Sequence[GivesWay],
        jobs_hold_on: Callable[[], bool],
        reclaim: Callable[[], None],
    ) -> None:
        """Make one.

        Args:
            givers: whose pages requests may have where the cache has given all that it can, in this order.
            jobs_hold_on: whether jobs beside requests hold pages that come free only when these are done.
            reclaim: gives back the pages of contexts that their users forgot.
        """
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.awaits_jobs = False
        self._memory = memory
        self._pool = memory.pool
        self._planner = planner
        self._tiering = tiering
        self._read_along = read_along
        self._healing = healing
        self._givers = givers
        self._jobs_hold_on = jobs_hold_on
        self._reclaim = reclaim

    def requests(self) -> list[Request]:
        """Every request that may hold pages."""
        return [*self.waiting, *self.running]

    @property
    def is_any(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    @property
    def awaits_first_token(self) -> bool:
        """Whether a prompt is waiting or being computed."""
        return bool(self.waiting) or any(not request.is_prefilled for request in self.running)

    @property
    def has_several_tenants(self) -> bool:
        """Whether they are not all one tenant's."""
        return len({request.tenant for request in self.requests()}) > 1

    @contextmanager
    def on_behalf_of(self, request: Request) -> Iterator[None]:
        """Whatever is raised inside ends this request, with its pages returned, and nothing else."""
        try:
            yield
        except BaseException as error:  # an exit, too: nobody but a caller's code raises one in the engine's thread
            logger.info("request %d failed: %r", request.request_id, error)
            self.fail(request, error)

    def fail(self, request: Request, error: BaseException) -> None:
        """Settle with an error: own pages are returned, a lent sequence is rolled back."""
        if request.handle.done:
            return
        self.leave(request)
        self.return_pages(request, request.num_kept_tokens)
        self.settle(request, error)

    def settle(self, request: Request, outcome: Completion | BaseException) -> None:
        """Tell whoever waits for a request, which is in no queue any more, how it has ended."""
        request.on_success = request.on_healed = None  # they know the context, which is kept by nobody but its user
        request.handle.settle(outcome)
        self._read_along.touch()  # its answer may be followed

    def leave(self, request: Request) -> None:
        """A request waits and runs no more."""
        self._tiering.is_computed(request)
        self.drop_reading(request)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)

    def return_pages(self, request: Request, num_kept: int) -> None:
        """Release what the request holds; a lent sequence keeps its first `num_kept` tokens instead."""
        self._planner.release(request.attempt)
        self._healing.drop(request)
        for branch in request.branches:
            if branch.sequence is not request.sequence:
                branch.sequence.release()
        if request.is_lent:
            request.sequence.truncate(num_kept)
            request.sequence.trim()
        else:
            request.sequence.release()

    def drop_attempt(self, request: Request) -> None:
        """A request reuses no moved KV after all."""
        self._planner.release(request.attempt)
        request.attempt = None

    def drop_reading(self, request: Request) -> None:
        """A request needs the open prompt no more that it was."""
        if request.reading is not None:
            self._read_along.end(request.reading)
            request.reading = None

    def can_write(self, request: Request, sequence: KVSequence, end: int, stuck: list[Request]) -> bool:
        """Own the pages up to `end`; a fork taken since admission may share the page that is written next.

        Args:
            stuck: takes the request where there are no pages for it.
        """
        try:
            self.make_room(sequence.num_missing_pages(end))
        except PoolExhausted:
            stuck.append(request)
            return False
        sequence.make_writable(sequence.num_computed, end)
        return True

    def make_room(self, num_pages: int) -> None:
        """Free pages until there are `num_pages`; cached prefixes and whatever else requests come before give way.

        Raises:
            PoolExhausted: not even all of that is enough; nothing was dropped.
        """
        if num_pages <= self._pool.num_free:
            return  # nearly always; who decodes asks in every step
        self._reclaim()
        self._memory.require_possible(num_pages, [pages for each in self._givers for pages in each.droppable_pages()])
        while True:
            try:
                self._memory.make_room(num_pages)
                return
            except PoolExhausted:
                if not any(each.give_way() for each in self._givers):
                    raise

    def waits_for_jobs(self) -> bool:
        """Whether a request that finds no room waits for jobs, such as an audit, to give back their pages."""
        self.awaits_jobs = self._jobs_hold_on()
        return self.awaits_jobs

    def nothing_to_wait_for(self, request: Request, error: PoolExhausted) -> PoolExhausted:
        """What to tell a request that finds no room where nothing runs that could return some."""
        return PoolExhausted(
            f"request {request.request_id} needs pages for {request.max_tokens} tokens and nothing is running that "
            f"could return some: {self._pool.num_free} of {self._pool.num_pages} pages are free, the others are held "
            f"by contexts or pinned; release contexts or raise pool_tokens ({error})"
        )
