"""Continuous batching, step by step: every step computes one token of each running answer and chunks of prompts.

A step is: drop what was cancelled, admit (`admission`), write moved KV, build the batch (`batches`), forward
(`passes`), commit (`answers`), and offer to others what is computed (`offers`). The lock is held while state changes
and released during the forward pass, so contexts can be forked and requests submitted meanwhile. Only this class and
idle work call the runner and write pages, and only from one thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.admission import Admission
from kvcomm.engine.answers import Answers
from kvcomm.engine.batches import Batches
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.grammar_turns import STEP_S, look
from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.healing_work import HealingWork
from kvcomm.engine.in_flight import InFlight
from kvcomm.engine.offers import Offers
from kvcomm.engine.passes import Computed, Failure, Work, compute
from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.reading import Reading
from kvcomm.engine.request import Request
from kvcomm.engine.spare import Spare
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import EngineClosed, PoolExhausted, RequestCancelled
from kvcomm.memory.memory import Memory
from kvcomm.model.runner import ModelRunner
from kvcomm.reuse.attempt import Stage
from kvcomm.reuse.idle_work import IdleWork
from kvcomm.reuse.learner import Learner
from kvcomm.reuse.plan import Explanation
from kvcomm.reuse.planner import Planner

EXPIRE_INTERVAL_S = 1.0


class Scheduler:
    """Steps of one engine, and the requests that are in them."""

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory,
        runner: ModelRunner,
        planner: Planner,
        learner: Learner,
        idle: IdleWork,
        lock: threading.RLock,
        *,
        adapters: Adapters,
        tiering: Tiering,
        reclaim: Callable[[], None],
        require_quota: Callable[[str, int], None],
    ) -> None:
        """Make one.

        Args:
            reclaim: gives back the pages of contexts that their users forgot.
            require_quota: raises where a tenant's quota leaves no room for so many more pages.
        """
        self.lock = lock
        self._planner = planner
        self._memory = memory
        self._runner = runner
        self._tiering = tiering
        gain, self._spare = GuessGain(), Spare(config.follow_share)
        self._offers = Offers(config, memory, adapters.live, planner=planner, learner=learner, tiering=tiering)
        self._healing = HealingWork(memory, require_quota=require_quota)
        self.read_along = ReadAlong(
            memory, config, self._spare, require_weights=self._offers.require_weights, require_quota=require_quota
        )
        self._in_flight = InFlight(
            memory,
            planner,
            tiering=tiering,
            read_along=self.read_along,
            healing=self._healing,
            givers=(tiering, idle, self.read_along),
            jobs_hold_on=idle.holds_on,
            reclaim=reclaim,
        )
        self._answers = Answers(self._in_flight, self._offers, healing=self._healing, gain=gain, tiering=tiering)
        self._admission = Admission(
            config,
            memory,
            self._in_flight,
            planner=planner,
            adapters=adapters,
            tiering=tiering,
            read_along=self.read_along,
            healing=self._healing,
            begin_answers=self._answers.begin,
        )
        self._batches = Batches(
            config,
            memory.pool.page_size,
            self._in_flight,
            spare=self._spare,
            gain=gain,
            tiering=tiering,
            read_along=self.read_along,
            healing=self._healing,
            take_over=self._answers.take_over,
            take_news=self._admission.take_news,
        )
        self._closed: EngineClosed | None = None
        self._next_expire_s = 0.0

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._in_flight.waiting)

    @property
    def num_running(self) -> int:
        """Requests admitted and not yet settled."""
        return len(self._in_flight.running)

    @property
    def is_closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed is not None

    @property
    def has_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return self._in_flight.is_any

    @property
    def has_work(self) -> bool:
        """Whether a step would find anything to do."""
        return self.has_requests or (bool(self.read_along.readings) and self.read_along.has_work)

    @property
    def awaits_first_token(self) -> bool:
        """Whether a prompt is waiting or being computed."""
        return self._in_flight.awaits_first_token

    @property
    def awaits_jobs(self) -> bool:
        """Whether nothing can be done for requests before jobs beside them are done."""
        return self._in_flight.awaits_jobs

    def requests(self) -> list[Request]:
        """Every request that may hold pages."""
        return self._in_flight.requests()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineClosed: no more requests are taken.
            PoolTooSmall: it would not fit an empty pool.
        """
        with self.lock:
            if self._closed is not None:
                raise self._closed
            self._admission.queue(request)

    def explain(self, request: Request) -> Explanation:
        """What would be planned for a trial request if it were admitted now; nothing is changed or kept."""
        with self.lock:
            return self._admission.explain(request)

    def cancel(self, request: Request) -> None:
        """Mark a request; the next step settles it and returns its pages."""
        request.is_cancelled = True

    def close(self, reason: EngineClosed) -> None:
        """Fail everything and take no more requests."""
        with self.lock:
            self._closed = reason
            for request in self.requests():
                self._in_flight.fail(request, reason)
            self.read_along.close(reason)

    def step(self) -> None:
        """Compute one batch and commit it."""
        self._offers.looked_at.clear()
        self._prepare_reuse()
        with self.lock:
            self._drop_cancelled()
            if self.read_along.readings:
                self.read_along.tend()
            self._expire()
            self._admission.admit()
            if not self.num_running:
                self._tiering.rest(self._in_flight.waiting)
        self._assemble()
        with self.lock:
            batch = self._batches.build()
        if not batch:
            return
        self._offers.looked_at.clear()
        begun_s = time.monotonic()
        computed, failures = compute(self._runner, batch)
        seconds = time.monotonic() - begun_s
        drawable = self._look_ahead(computed)
        with self.lock:
            self._tiering.computed(batch, seconds)
            if not failures:
                self._batches.timed(batch, seconds)
            self._commit(drawable, failures)

    def _prepare_reuse(self) -> None:
        waiting = list(self._in_flight.waiting)
        if any(request.ask is not None or request.may_move for request in waiting):
            with suppress(PoolExhausted):  # no room for a trial now: nothing is moved until there is
                self._planner.prepare()

    def _assemble(self) -> None:
        """Write moved KV for requests that were just admitted: outside the lock, to pages that are theirs alone."""
        for request in list(self._in_flight.running):
            attempt = request.attempt
            if attempt is None or attempt.stage is not Stage.PLANNED:
                continue
            try:
                with self._runner.serving(request.weights):
                    attempt.assemble(request.sequence)
                todo = attempt.begin()
            except Exception as error:
                todo = self._answers.without_moving(request, attempt, error)
            with self.lock:
                if not request.handle.done:
                    with self._in_flight.on_behalf_of(request):
                        self._answers.carry_out(request, todo)

    def _drop_cancelled(self) -> None:
        for request in self.requests():
            if request.is_cancelled:
                self._in_flight.fail(request, RequestCancelled(f"request {request.request_id} was cancelled"))

    def _expire(self) -> None:
        now = time.monotonic()
        if self._memory.tree.has_lifetimes and now >= self._next_expire_s:
            self._memory.expire()
            self._next_expire_s = now + EXPIRE_INTERVAL_S

    def _look_ahead(self, computed: Sequence[Computed]) -> Sequence[Computed]:
        """Let grammars say which tokens may come next: outside the lock, since hostile ones take their time.

        Where they take too much of it, what is left of them is not committed and computed again: a few rows, while
        everybody in the step would wait.
        """
        states = [state for each in computed if (state := _must_look(each.work)) is not None]
        waiting = look(states, STEP_S if self._in_flight.has_several_tenants else math.inf)
        return [each for each in computed if _must_look(each.work) not in waiting]

    def _commit(self, computed: Sequence[Computed], failures: Sequence[Failure]) -> None:
        for request, error in failures:
            if isinstance(request, Reading):
                self.read_along.spoil(request, error)
            else:
                self._in_flight.fail(request, error)
        for work, logits, finite in computed:
            request = work.request
            if isinstance(request, Reading):
                self.read_along.computed(request, work.runs[0])
            elif not request.handle.done:  # closed meanwhile, or another choice of it failed in this very step
                with self._in_flight.on_behalf_of(request):
                    self._answers.commit(work, request, logits, finite)


def _must_look(work: Work) -> GrammarState | None:
    """The grammar that has to say which token may come next, before one is drawn."""
    branch = work.branch
    if branch is None or branch.grammar is None or branch.forced or not branch.grammar.must_look:
        return None
    return branch.grammar
