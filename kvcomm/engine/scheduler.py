"""Continuous batching: every step computes one token of each running answer and chunks of waiting prompts.

Where few answers run, a step also tries guesses at their next tokens (see `guesses`): each token is drawn as always,
and a guess that equals it has its successor's logits already. What is spare beside answers goes to open prompts (see
`read_along`), but for the time in which anybody waits for a first token.

A step is: drop what was cancelled, admit, write moved KV, build the batch, forward, commit. The lock is held while
state changes and released during the forward pass, so contexts can be forked and requests submitted meanwhile. Only
this class and idle work call the runner and write pages, and only from one thread. A request is admitted when the pages
for the longest possible answers of all its choices are there (evicting cached prefixes if that makes enough of them),
so a running request is not thrown out again; a full pool queues. A pass is for one identity of weights: requests with
several adapters take turns. What is decoded does not depend on the batch: samplers belong to choices, and whatever is
raised on behalf of a request ends that request only (`_on_behalf_of`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AnySequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters, Turns
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.grammar_turns import STEP_S, left_out, look
from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.guesses import CERTAIN, MAX_MATCH, Found, repeated
from kvcomm.engine.healing_work import HealingWork, is_of_twin
from kvcomm.engine.open_prompt import Reading
from kvcomm.engine.passes import Computed, Failure, Work, compute
from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.request import ANSWER, Branch, Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampler import token_logprob
from kvcomm.engine.spare import Spare
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import (
    EngineClosed,
    NumericalError,
    PoolExhausted,
    PoolTooSmall,
    RequestCancelled,
)
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence, num_common
from kvcomm.model.live import Weights
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.reuse.attempt import Attempt, Stage, ToCompute
from kvcomm.reuse.idle_work import IdleWork
from kvcomm.reuse.learner import Learner
from kvcomm.reuse.plan import Explanation, Reason, exact_plan
from kvcomm.reuse.planner import Planner

logger = logging.getLogger("kvcomm.engine")

EXPIRE_INTERVAL_S = 1.0

MAX_SCORED = 128
"""Prompt tokens in a step of which all logits are wanted: a row of them takes more memory than its KV."""

MAX_FORCED = 64
"""Forced tokens that are computed in one pass with the token before them."""


class GivesWay(Protocol):
    """Holds pages that requests come before."""

    def give_way(self) -> bool:
        """Give some of them back; False: there are none."""
        ...

    def droppable_pages(self) -> list[PageIds]:
        """Page references that `give_way` would give back, sooner or later."""
        ...


class Scheduler:
    """Waiting and running requests of one engine.

    What always holds: a request is in exactly one of waiting, running or settled; a settled request holds no pages
    except those of a sequence lent by a context.
    """

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
        """Args:
        reclaim: gives back the pages of contexts that their users forgot.
        require_quota: raises where a tenant's quota leaves no room for so many more pages.
        """
        self.lock = lock
        self._planner = planner
        self._learner = learner
        self._idle = idle
        self._config = config
        self._memory = memory
        self._pool = memory.pool
        self._tree = memory.tree
        self._runner = runner
        self._adapters = adapters
        self._tiering = tiering
        self._reclaim = reclaim
        self._healing = HealingWork(memory, require_quota=require_quota)
        self._spare = Spare(config.follow_share)
        self._gain = GuessGain()
        self.read_along = ReadAlong(
            memory, config, self._spare, require_weights=self._require_closely, require_quota=require_quota
        )
        self._turns = Turns()
        self._looked_at: set[str] = set()  # closely: digests of weights, since the last pass
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._closed: EngineClosed | None = None
        self._next_expire_s = 0.0
        self._has_left_out = False  # of the step that is built, answers that could be decoded

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests admitted and not yet settled."""
        return len(self._running)

    @property
    def is_closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed is not None

    @property
    def has_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would find anything to do."""
        return self.has_requests or self.read_along.has_work

    @property
    def awaits_first_token(self) -> bool:
        """Whether a prompt is waiting or being computed."""
        return bool(self._waiting) or any(not request.is_prefilled for request in self._running)

    def requests(self) -> list[Request]:
        """Every request that may hold pages."""
        return [*self._waiting, *self._running]

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineClosed: no more requests are taken.
            PoolTooSmall: it would not fit an empty pool.
        """
        with self.lock:
            if self._closed is not None:
                raise self._closed
            needed = request.num_pages(self._pool.page_size)
            if needed > self._pool.num_pages:
                answers = f"{len(request.branches)} answers" if len(request.branches) > 1 else "answer"
                raise PoolTooSmall(
                    f"prompt and {answers} of up to {request.max_tokens} tokens need {needed} pages of "
                    f"{self._pool.page_size}; the whole pool has {self._pool.num_pages}: "
                    "lower max_new_tokens or n, shorten the prompt or raise pool_tokens"
                )
            if self._uses_tree(request):
                self._tiering.ask(request, may_reuse=self._planner.may_reuse(request))
            self._waiting.append(request)
            self._tiering.wake()

    def explain(self, request: Request) -> Explanation:
        """What would be planned for a trial request if it were admitted now; nothing is changed or kept."""
        with self.lock:
            try:
                self._plan(request)
                return self._planner.explain(request)
            finally:
                self._drop_attempt(request)
                request.sequence.release()

    def cancel(self, request: Request) -> None:
        """Mark a request; the next step settles it and returns its pages."""
        request.is_cancelled = True

    def close(self, reason: EngineClosed) -> None:
        """Fail everything and take no more requests."""
        with self.lock:
            self._closed = reason
            for request in self.requests():
                self._fail(request, reason)
            self.read_along.close(reason)

    def step(self) -> None:
        """Compute one batch and commit it."""
        self._looked_at.clear()
        self._prepare_reuse()
        with self.lock:
            self._drop_cancelled()
            self.read_along.tend()
            self._expire()
            self._admit()
            if not self._running:
                self._tiering.rest(self._waiting)
        self._assemble()
        with self.lock:
            batch = self._build_batch()
        if not batch:
            return
        self._looked_at.clear()
        begun_s = time.monotonic()
        computed, failures = compute(self._runner, batch)
        seconds = time.monotonic() - begun_s
        drawable = self._look_ahead(computed)
        with self.lock:
            self._tiering.computed(batch, seconds)
            if not failures:
                self._timed(_num_rows(batch), seconds)
            self._commit(drawable, failures)

    def _timed(self, rows: _Rows, seconds: float) -> None:
        """Learn from what a pass has taken: what is spare beside answers, and what guesses are worth."""
        is_wanted = self.read_along.wants_more or any(map(self._healing.wants_more, self._running))
        self._spare.passed(*rows, seconds, is_wanted=is_wanted)
        if rows.answers and not rows.prompts and not rows.beside:
            self._gain.passed(rows.answers, seconds)

    @contextmanager
    def _on_behalf_of(self, request: Request) -> Iterator[None]:
        """Under the lock: whatever is raised inside ends this request, with its pages returned, and nothing else."""
        try:
            yield
        except BaseException as error:  # an exit, too: nobody but a caller's code raises one in this thread
            logger.info("request %d failed: %r", request.request_id, error)
            self._fail(request, error)

    def _prepare_reuse(self) -> None:
        if any(request.ask is not None or self._planner.may_reuse(request) for request in list(self._waiting)):
            with suppress(PoolExhausted):  # no room for a trial now: nothing is moved until there is
                self._planner.prepare()

    def _assemble(self) -> None:
        """Write moved KV for requests that were just admitted: outside the lock, to pages that are theirs alone."""
        for request in list(self._running):
            attempt = request.attempt
            if attempt is None or attempt.stage is not Stage.PLANNED:
                continue
            try:
                with self._runner.serving(request.weights):
                    attempt.assemble(request.sequence)
                todo = attempt.begin()
            except Exception as error:
                todo = self._without_moving(request, attempt, error)
            with self.lock:
                if not request.handle.done:
                    with self._on_behalf_of(request):
                        self._carry_out(request, todo)

    def _without_moving(self, request: Request, attempt: Attempt, error: Exception) -> ToCompute:
        """Moving has failed, and the caller can be served without."""
        logger.error("moving KV failed: %r; request %d is computed exactly", error, request.request_id, exc_info=error)
        return attempt.retreat(Reason.FAILED)

    def _carry_out(self, request: Request, todo: ToCompute) -> None:
        """Compute what an attempt at moved KV asks for next; one that gives up needs its sources no more."""
        request.carry_out(todo)
        if todo.moved_from is None:
            self._drop_attempt(request)

    def _drop_attempt(self, request: Request) -> None:
        """A request reuses no moved KV after all."""
        self._planner.release(request.attempt)
        request.attempt = None

    def _drop_cancelled(self) -> None:
        for request in self.requests():
            if request.is_cancelled:
                self._fail(request, RequestCancelled(f"request {request.request_id} was cancelled"))

    def _expire(self) -> None:
        now = time.monotonic()
        if now >= self._next_expire_s:
            self._memory.expire()
            self._next_expire_s = now + EXPIRE_INTERVAL_S

    def _admit(self) -> None:
        """Admit in order of arrival; a request whose prefix is being computed right now waits for it."""
        for request in list(self._waiting):
            if len(self._running) >= self._config.max_running:
                return
            with self._on_behalf_of(request):
                if self._must_wait(request):
                    continue
                try:
                    self._adapters.renew(request)
                    self._take_pages(request)
                except PoolExhausted as error:
                    if self._running:
                        return
                    raise self._nothing_to_wait_for(request, error) from error
                self._waiting.remove(request)
                self._running.append(request)
                request.clock.admitted = time.monotonic()
                if request.ready_logits is not None:
                    self._begin_answers(request, request.ready_logits)

    def _must_wait(self, request: Request) -> bool:
        return (
            self._tiering.must_wait(request)
            or self._is_prefix_in_flight(request)
            or self._planner.waits_for_source(request, self._running)
        )

    def _is_prefix_in_flight(self, request: Request) -> bool:
        """Whether a running prefill will soon leave at least a page in the tree that this request could share."""
        if not self._uses_tree(request):
            return False
        own = request.sequence
        for other in self._running:
            if other.is_prefilled or other.namespace != request.namespace or not self._uses_tree(other):
                continue
            num_shared = num_common(own.token_ids[:-1], other.sequence.token_ids)
            whole_pages = num_shared - num_shared % self._pool.page_size
            is_worth_it = whole_pages > own.num_computed
            if (
                is_worth_it
                and self._tree.match(request.namespace, own.token_ids[:whole_pages]).num_tokens < whole_pages
            ):
                return True
        return False

    def _uses_tree(self, request: Request) -> bool:
        is_exact = request.sequence.fidelity is Fidelity.EXACT
        return self._may_read_cache(request) and is_exact and request.ready_logits is None

    def _may_read_cache(self, request: Request) -> bool:
        return self._config.cache and request.reads_cache

    def _take_pages(self, request: Request) -> None:
        """Share what the tree has of the prompt and allocate the rest, for all choices, or change nothing.

        What was found for a request is held for it, so it cannot be evicted; where that leaves too little room, and
        nothing runs that could return some, the request does without.
        """
        sequence = request.sequence
        self._plan(request)
        num_own = request.num_own_pages(self._pool.page_size)
        try:
            while True:
                try:
                    num_missing = sequence.num_missing_pages(request.max_tokens)
                    num_missing += num_own * (len(request.branches) - 1)
                    self._make_room(num_missing + self._healing.num_pages(request))
                    break
                except PoolExhausted:
                    if self._running or not self._do_without(request):
                        raise
        except PoolExhausted:
            self._drop_attempt(request)
            if request.is_lent:
                sequence.trim()
            else:
                sequence.release()
            raise
        self._drop_reading(request)  # first: a page that both hold would be copied
        sequence.make_writable(sequence.num_computed, request.max_tokens)
        self._healing.reserve(request)
        for branch in request.branches[1:]:
            # Until the prompt is computed and can be forked, a further choice holds just the pages it will need.
            branch.sequence = Sequence(self._pool)
            branch.sequence.make_writable(0, num_own * self._pool.page_size)

    def _do_without(self, request: Request) -> bool:
        """Give up something that was found for a request and takes room; False if there is nothing like that."""
        sequence, page_size = request.sequence, self._pool.page_size
        if self._healing.do_without(request):
            return True
        if request.attempt is not None:
            self._drop_attempt(request)
        elif not request.is_lent and request.ready_logits is None and sequence.num_computed % page_size:
            # A page of which only a part is shared is needed twice: for whoever has it, and for what is written behind.
            sequence.rewind(sequence.num_computed - sequence.num_computed % page_size)
            sequence.trim()
        else:
            return False
        request.plan = exact_plan(sequence.num_computed, sequence.num_tokens, Reason.NO_ROOM)
        request.pending = list(request.plan.stretches)
        return True

    def _plan(self, request: Request) -> None:
        """Share what the tree has of the prompt, and decide about the rest."""
        sequence = request.sequence
        if request.ready_logits is None:
            # The last token is always computed: its logits are not in the cache.
            sequence.rewind(min(sequence.num_computed, sequence.num_tokens - 1))
        num_before = sequence.num_computed
        if request.ready_logits is None and request.reads_cache:
            self.read_along.share(request)
        reason = Reason.NEW if self._may_read_cache(request) else Reason.CACHE_OFF
        if self._uses_tree(request):
            reason = self._share_from_tree(request)
        if request.reading is not None:
            request.num_read = self.read_along.num_read(request, num_before)
        if self._planner.may_reuse(request) and request.ready_logits is None:
            plan, request.attempt = self._planner.plan(request, reason)
            request.plan = self.read_along.told(request, plan)
        else:
            request.plan = self.read_along.told(request, self._tiering.plan(request, reason))
        request.pending = list(request.plan.stretches)

    def _share_from_tree(self, request: Request) -> Reason:
        sequence = request.sequence
        find = self._tree.look if request.is_trial else self._tree.match
        match = find(request.namespace, sequence.token_ids[:-1])
        if match.num_tokens > sequence.num_computed:
            sequence.adopt(match.pages, match.num_tokens)
        if sequence.num_computed >= sequence.num_tokens - 1:
            return Reason.LAST_TOKEN
        return Reason(match.reason.value) if match.reason is not None else Reason.NEW

    def _take_news(self, request: Request) -> None:
        """Share what a tier has given of a prompt since it was begun, instead of computing that."""
        sequence, page_size = request.sequence, self._pool.page_size
        if request.attempt is not None or not self._tiering.has_news(request):
            return
        before = sequence.num_computed
        match = self._tree.match(request.namespace, sequence.token_ids[:-1])
        num_tokens = match.num_tokens // page_size * page_size
        if num_tokens > before:
            sequence.adopt(match.pages[: num_tokens // page_size], num_tokens)
            request.plan = request.plan.reused(before, num_tokens)
            request.pending = [(max(start, num_tokens), end) for start, end in request.pending if end > num_tokens]

    def _nothing_to_wait_for(self, request: Request, error: PoolExhausted) -> PoolExhausted:
        return PoolExhausted(
            f"request {request.request_id} needs pages for {request.max_tokens} tokens and nothing is running that "
            f"could return some: {self._pool.num_free} of {self._pool.num_pages} pages are free, the others are held "
            f"by contexts or pinned; release contexts or raise pool_tokens ({error})"
        )

    def _build_batch(self) -> list[Work]:
        stuck: list[Request] = []
        self._has_left_out = False
        for digest in self._turns.order(self._running):
            batch = self._batch_of([each for each in self._running if each.weights.digest == digest], stuck)
            if batch:
                self._turns.taken(digest)
                return [*batch, *self._beside(digest, batch)]
        if not self.has_requests:
            for digest in self.read_along.digests():
                batch = self._beside(digest, [])
                if batch:
                    return batch
        stuck = [request for request in stuck if not request.handle.done]
        if stuck and not self._has_left_out:
            # Everybody waits for pages and nobody can return any: the youngest gives way.
            victim = stuck[-1]
            self._fail(victim, self._nothing_to_wait_for(victim, PoolExhausted("while decoding")))
        return []

    def _beside(self, digest: str, batch: AnySequence[Work]) -> list[Work]:
        """What is computed beside a batch, for nobody who waits: not where a first token is waited for.

        Open prompts come before twins: what they have not read by the end delays a first token, a twin a later one.
        """
        if self.awaits_first_token:
            return []
        num_answer_rows, num_answers = _num_rows(batch).answers, sum(work.branch is not None for work in batch)
        beside = self.read_along.work(digest, num_answer_rows, num_answers)
        num_left = self._spare.num_rows(num_answer_rows, num_answers) - sum(work.num_tokens for work in beside)
        for request in list(self._running) if num_answer_rows else ():
            if request.weights.digest == digest:
                with self._on_behalf_of(request):
                    work = self._healing.spare_work(request, num_left)
                    if work is not None:
                        num_left -= work.num_tokens
                        beside.append(work)
        return beside

    def _batch_of(self, running: AnySequence[Request], stuck: list[Request]) -> list[Work]:
        """Work for one pass: of requests that have the same weights."""
        self._take_over(running)
        batch = self._decode_work(running, stuck)
        budget = self._config.max_batch_tokens - sum(work.num_tokens for work in batch)
        if any(request.is_prefilled and not self._healing.is_awaited(request) for request in self._running):
            budget = min(budget, self._config.prefill_chunk)
        for request in running:
            if budget > 0 and (not request.is_prefilled or self._healing.is_awaited(request)):
                with self._on_behalf_of(request):
                    work = self._awaited_work(request, budget, stuck)
                    if work is not None:
                        budget -= work.num_tokens
                        batch.append(work)
        # Where one choice of a request has failed, the pages of its others are gone as well.
        return [work for work in batch if not _has_ended(work.request)]

    def _decode_work(self, running: AnySequence[Request], stuck: list[Request]) -> list[Work]:
        batch: list[Work] = []
        answers = [(request, branch) for request in running for branch in request.active_branches]
        answers = [each for each in answers if each[0].is_prefilled and not self._healing.is_awaited(each[0])]
        if self._has_several_tenants:
            waiting = left_out(branch.grammar for _, branch in answers if branch.grammar and not branch.forced)
            answers = [(request, branch) for request, branch in answers if branch.grammar not in waiting]
            self._has_left_out = self._has_left_out or bool(waiting)
        found = [self._guesses(request, branch) for request, branch in answers]
        num_rows = self._config.draft_rows - len(answers)
        shares = self._gain.shares([(each.num_matched, len(each.token_ids)) for each in found], num_rows)
        for (request, branch), each, num_guesses in zip(answers, found, shares, strict=True):
            if request.handle.done:
                continue  # it, or another choice of it, has failed just now
            with self._on_behalf_of(request):
                sequence = branch.sequence
                if self._can_write(request, sequence, sequence.num_tokens, stuck):
                    guesses, branch.num_matched = each.token_ids[:num_guesses], each.num_matched
                    run = _run(sequence, sequence.num_computed, sequence.num_tokens, num_logits=1 + len(guesses))
                    run = run._replace(token_ids=np.concatenate([run.token_ids, guesses]))
                    batch.append(Work(request, branch, sequence, (run,)))
        return batch

    def _guesses(self, request: Request, branch: Branch) -> Found:
        """Guesses at the next tokens of a choice; none where looking for them has ended its request."""
        found = Found(branch.sequence.token_ids[:0], 0)
        if not request.handle.done:
            with self._on_behalf_of(request):
                found = self._found(request, branch)
        return found

    def _found(self, request: Request, branch: Branch) -> Found:
        """Guesses at the next tokens of a choice: those its answer may still have, within the pages it owns."""
        num_wanted = request.sampling.max_new_tokens - len(branch.token_ids) - 1
        num_slots = branch.sequence.num_pages * self._pool.page_size - branch.sequence.num_tokens
        num = max(0, min(self._config.draft_rows, num_wanted, num_slots))
        if (num_moved := self._healing.num_guesses(request, branch)) is not None:
            num = max(0, min(num, num_moved))
        if branch.forced:  # these are none: they will come
            return Found(np.array(list(branch.forced)[:num], dtype=np.int32), CERTAIN)
        if branch.grammar is not None and branch.grammar.is_dear:
            num = 0  # behind each that is right it would be asked once more
        found = repeated(branch.sequence.token_ids, num)
        return found._replace(token_ids=branch.allowed(found.token_ids))

    def _awaited_work(self, request: Request, budget: int, stuck: list[Request]) -> Work | None:
        """What comes next of a prompt, or of the exact twin that an answer waits for."""
        if not request.is_prefilled:
            return self._prefill_work(request, budget, stuck)
        try:
            return self._healing.awaited_work(request, budget)
        except PoolExhausted:
            stuck.append(request)
            return None

    def _prefill_work(self, request: Request, budget: int, stuck: list[Request]) -> Work | None:
        sequence = request.sequence
        is_scored = request.sampling.prompt_logprobs is not None
        if is_scored:
            budget = min(budget, MAX_SCORED)
        self._take_news(request)
        if request.attempt is None:
            budget = min(budget, self._tiering.num_next(request, request.pending[0][0], request.num_prompt_tokens))
        runs: list[Run] = []
        for start, end in request.pending:
            if budget <= 0:
                break
            end = min(end, start + budget)
            budget -= end - start
            num_logits = end - start if is_scored else int(end == request.num_prompt_tokens)
            runs.append(_run(sequence, start, end, num_logits=num_logits))
        if not self._can_write(request, sequence, runs[-1].end, stuck):
            return None
        runs = [run._replace(pages=sequence.pages.copy()) for run in runs]
        return Work(request, None, sequence, tuple(runs))

    def _can_write(self, request: Request, sequence: Sequence, end: int, stuck: list[Request]) -> bool:
        """Own the pages up to `end`; a fork taken since admission may share the page that is written next."""
        try:
            self._make_room(sequence.num_missing_pages(end))
        except PoolExhausted:
            stuck.append(request)
            return False
        sequence.make_writable(sequence.num_computed, end)
        return True

    def _make_room(self, num_pages: int) -> None:
        """Free pages until there are `num_pages`; cached prefixes and studies that wait for idle time give way.

        Raises:
            PoolExhausted: not even all of them are enough; nothing was dropped.
        """
        if num_pages <= self._pool.num_free:
            return  # nearly always; who decodes asks in every step
        self._reclaim()
        others: tuple[GivesWay, ...] = (self._tiering, self._idle, self.read_along)
        self._memory.require_possible(num_pages, [pages for each in others for pages in each.droppable_pages()])
        while True:
            try:
                self._memory.make_room(num_pages)
                return
            except PoolExhausted:
                if not any(each.give_way() for each in others):
                    raise

    def _look_ahead(self, computed: AnySequence[Computed]) -> AnySequence[Computed]:
        """Let grammars say which tokens may come next: outside the lock, since hostile ones take their time.

        Where they take too much of it, what is left of them is not committed and computed again: a few rows, while
        everybody in the step would wait.
        """
        states = [state for each in computed if (state := _must_look(each.work)) is not None]
        waiting = look(states, STEP_S if self._has_several_tenants else math.inf)
        return [each for each in computed if _must_look(each.work) not in waiting]

    @property
    def _has_several_tenants(self) -> bool:
        return len({request.tenant for request in self.requests()}) > 1

    def _commit(self, computed: AnySequence[Computed], failures: AnySequence[Failure]) -> None:
        for request, error in failures:
            if isinstance(request, Reading):
                self.read_along.spoil(request, error)
            else:
                self._fail(request, error)
        for work, logits, finite in computed:
            request = work.request
            if isinstance(request, Reading):
                self.read_along.computed(request, work.runs[0])
                continue
            if request.handle.done:
                continue  # closed meanwhile, or another choice of the same request failed in this very step
            with self._on_behalf_of(request):
                if is_of_twin(work):
                    self._healed(work, request, logits, finite)
                elif work.branch is not None:
                    self._decoded(work, request, work.branch, logits, finite)
                else:
                    self._prefilled(work, request, logits, finite)

    def _decoded(self, work: Work, request: Request, branch: Branch, logits: Tensor, finite: AnySequence[bool]) -> None:
        """Draw the next token of a choice, and behind every guess that equals what was drawn one more."""
        num_right = self._draw(work, request, branch, logits, finite)
        if branch.finish_reason is None and 0 < branch.num_matched <= MAX_MATCH:
            self._gain.tried(branch.num_matched, len(finite) - 1, num_right)

    def _draw(self, work: Work, request: Request, branch: Branch, logits: Tensor, finite: AnySequence[bool]) -> int:
        """Draw as far as guesses are right; returns how many were."""
        run, sequence, num_right = work.runs[0], work.sequence, 0
        num_before = run.end - len(finite)  # tokens that were forced, and of which nobody wants to know the next
        for index, is_finite in enumerate(finite):
            end = num_before + index + 1
            if index:
                if (
                    branch.finish_reason is not None
                    or sequence.token_ids[end - 1] != run.token_ids[end - 1 - run.start]
                ):
                    break
                branch.num_guessed += 1
                num_right += 1
            sequence.count(end)
            if not is_finite:
                raise _not_finite(request, end)
            if end == sequence.num_tokens:  # else what comes next is known: it was forced by what was just drawn
                self._accept(request, branch, logits[index])
        return num_right

    def _healed(self, work: Work, request: Request, logits: Tensor, finite: AnySequence[bool]) -> None:
        """Count what was computed of an exact twin; where that was its last, its request goes on with it."""
        work.sequence.count(work.end)
        if not all(finite):
            raise _not_finite(request, work.end)
        if self._healing.has_caught_up(request):
            self._let_take_over(request)
        if work.branch is not None:
            self._accept(request, work.branch, logits[-1])

    def _take_over(self, running: AnySequence[Request]) -> None:
        """Let the twins of requests that wait for nothing else take over."""
        for request in running:
            with self._on_behalf_of(request):
                if self._healing.has_caught_up(request):
                    self._let_take_over(request)

    def _let_take_over(self, request: Request) -> None:
        """From now on all KV of a request is exact, for it and for others. What was served before is judged as such."""
        assert request.healing is not None
        self._require_its_weights(request)
        self._learn_from(request)
        request.healing.put_in_place()
        if request.on_healed is not None:
            request.on_healed()
        self._remember(request, request.sequence, whole=False)
        if self._config.cache:
            self._planner.replace(request, request.segments)
        if not request.active_branches:
            self._finish(request)

    def _prefilled(self, work: Work, request: Request, logits: Tensor, finite: AnySequence[bool]) -> None:
        """Count what was computed of a prompt. Behind moved KV nothing counts before all of it is in place."""
        sequence = work.sequence
        request.pending = [(max(start, work.end), end) for start, end in request.pending if end > work.end]
        if request.attempt is None or not request.pending:
            sequence.count(work.end)
        if work.num_logits == 0:
            return
        if not all(finite):
            raise _not_finite(request, work.end - len(finite) + finite.index(False) + 1)
        if request.sampling.prompt_logprobs is not None:
            request.score(logits, work.end - len(finite))
            if work.end < request.num_prompt_tokens:
                return
        todo = None if request.attempt is None else self._advance(request, request.attempt)
        if todo is None:
            self._begin_answers(request, logits[-1])
        else:
            self._carry_out(request, todo)

    def _advance(self, request: Request, attempt: Attempt) -> ToCompute | None:
        try:
            return attempt.advance()
        except Exception as error:
            return self._without_moving(request, attempt, error)

    def _begin_answers(self, request: Request, logits: Tensor) -> None:
        """The prompt is computed: fork the sequence for further choices and draw everybody's first token."""
        self._require_its_weights(request)
        self._tiering.is_computed(request)
        self._remember(request, request.sequence, whole=False)
        self._publish(request)
        request.last_logits = logits.clone()
        self._healing.begin(request)
        request.clock.first_token = time.monotonic()
        if request.sampling.max_new_tokens == 0:
            for branch in request.branches:
                branch.finish_reason = "length"
            self._finish(request)
            return
        for branch in request.branches[1:]:
            self._fork(request, branch)
        for branch in request.branches:
            self._accept(request, branch, logits)

    def _fork(self, request: Request, branch: Branch) -> None:
        """Give a further choice the prompt's pages, and own ones behind it out of those that it has held so far."""
        branch.sequence.release()
        branch.sequence = request.sequence.fork()
        branch.sequence.make_writable(branch.sequence.num_computed, request.max_tokens)

    def _accept(self, request: Request, branch: Branch, logits: Tensor) -> None:
        """Take the next token of a choice, drawn unless its grammar forces one, and see whether it ends."""
        if branch.forced:
            token_id = branch.forced.popleft()
        else:
            drawn = branch.sampler.sample(logits, branch.sequence.token_ids, len(branch.token_ids))
            if drawn is None or branch.sampler.ends(drawn):
                if drawn is not None and request.sampling.logprobs is not None:
                    branch.end_logprob = token_logprob(logits, drawn, request.sampling.logprobs)
                self._finish_branch(request, branch, "stop")
                return
            token_id = drawn
            branch.drew(token_id)
        if request.sampling.logprobs is not None:
            branch.logprobs.append(token_logprob(logits, token_id, request.sampling.logprobs))
            self._append(request, branch, token_id)
            return  # what is forced behind it has logits to wait for
        self._append(request, branch, token_id)
        for _ in range(min(len(branch.forced), MAX_FORCED)):
            if branch.finish_reason is None:
                branch.num_guessed += 1
                self._append(request, branch, branch.forced.popleft())

    def _append(self, request: Request, branch: Branch, token_id: int) -> None:
        """One more token of a choice, which may be its last one."""
        branch.token_ids.append(token_id)
        branch.sequence.append([token_id])
        text = branch.detokenizer.push(token_id)
        if branch.detokenizer.stopped is not None or branch.is_over:
            self._finish_branch(request, branch, "stop", text)
        elif len(branch.token_ids) == request.sampling.max_new_tokens:
            self._finish_branch(request, branch, "length", text)
        else:
            request.publish(branch, text)

    def _finish_branch(self, request: Request, branch: Branch, finish_reason: str, text: str = "") -> None:
        self._require_its_weights(request)
        text += branch.detokenizer.finish()
        # The end of the text may hold a stop string that could have become something else until now.
        branch.finish_reason = finish_reason if branch.detokenizer.stopped is None else "stop"
        request.publish(branch, text)
        if branch.sequence is not request.sequence:
            self._remember(request, branch.sequence, whole=True)
            branch.sequence.release()
        if not request.active_branches and not self._healing.is_awaited(request):
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._leave(request)
        sequence = request.sequence
        completion = request.completion()
        self._learn_from(request)
        self._remember(request, sequence, whole=not request.is_lent)
        self._keep_answer(request)
        self._publish(request)
        self._planner.release(request.attempt)
        self._return_pages(request, sequence.num_tokens)
        if request.on_success is not None:
            request.on_success()
        self._settle(request, completion)

    def _learn_from(self, request: Request) -> None:
        if request.healed_after is not None:
            return  # that was done while what it was served was still there
        try:
            self._learner.after(request)
        except Exception:  # the answer is there, whether or not anything can be learned from it
            logger.exception("nothing is learned from request %d", request.request_id)

    def _keep_answer(self, request: Request) -> None:
        """Let the sequence end as the first answer does; what a stop string left of a token is still to be computed."""
        branch, sequence = request.branches[0], request.sequence
        kept = branch.detokenizer.num_kept_tokens
        sequence.truncate(request.num_prompt_tokens + kept)
        sequence.append(branch.detokenizer.answer_ids[kept:])

    def _fail(self, request: Request, error: BaseException) -> None:
        """Settle with an error: own pages are returned, a lent sequence is rolled back."""
        if request.handle.done:
            return
        self._leave(request)
        self._planner.release(request.attempt)
        self._return_pages(request, request.num_kept_tokens)
        self._settle(request, error)

    def _settle(self, request: Request, outcome: Completion | BaseException) -> None:
        request.on_success = request.on_healed = None  # they know the context, which is kept by nobody but its user
        request.handle.settle(outcome)
        self.read_along.touch()  # its answer may be followed

    def _return_pages(self, request: Request, num_kept: int) -> None:
        """Release what the request holds; a lent sequence keeps its first `num_kept` tokens instead."""
        self._healing.drop(request)
        for branch in request.branches:
            if branch.sequence is not request.sequence:
                branch.sequence.release()
        if request.is_lent:
            request.sequence.truncate(num_kept)
            request.sequence.trim()
        else:
            request.sequence.release()

    def _require_its_weights(self, request: Request) -> None:
        """Before anything computed is offered to others: look closely whether the weights are still the request's.

        Raises:
            WeightsChanged, UnsupportedModel: they are not.
        """
        self._require_closely(request.weights)

    def _require_closely(self, weights: Weights) -> None:
        if weights.digest not in self._looked_at:
            self._adapters.live.require(weights, closely=True)
            self._looked_at.add(weights.digest)

    def _drop_reading(self, request: Request) -> None:
        """A request needs the open prompt no more that it was."""
        if request.reading is not None:
            self.read_along.end(request.reading)
            request.reading = None

    def _leave(self, request: Request) -> None:
        self._tiering.is_computed(request)
        self._drop_reading(request)
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)

    def _publish(self, request: Request) -> None:
        """Let other contexts move what this one has computed so far: prompt, and behind it the first answer."""
        if not self._config.cache:
            return
        kept = () if request.active_branches else request.branches[0].detokenizer.answer_ids
        answer = (Segment(kept, ANSWER),) if kept else ()
        segments = (*request.segments, *answer)
        if any(segment.name is not None for segment in segments):
            if request.published_s is None:
                request.published_s = time.monotonic()
            self._planner.publish(request, segments)

    def _remember(self, request: Request, sequence: Sequence, *, whole: bool) -> None:
        """Put computed exact tokens into the tree; the last, partly filled page only if nobody writes on in it."""
        if not self._config.cache:
            return
        page_size = self._pool.page_size
        is_whole = whole and sequence.num_exact == sequence.num_computed
        num_tokens = sequence.num_exact if is_whole else sequence.num_exact // page_size * page_size
        if num_tokens:
            pages = sequence.pages[: -(-num_tokens // page_size)]
            self._tree.insert(request.namespace, sequence.token_ids[:num_tokens], pages)
            self._tiering.remember(request, sequence, num_tokens, pages)


def _must_look(work: Work) -> GrammarState | None:
    """The grammar that has to say which token may come next, before one is drawn."""
    branch = work.branch
    if branch is None or branch.grammar is None or branch.forced or not branch.grammar.must_look:
        return None
    return branch.grammar


class _Rows(NamedTuple):
    """Rows of a pass: of answers, of prompts that somebody waits for, and beside them."""

    answers: int
    prompts: int
    beside: int


def _num_rows(batch: AnySequence[Work]) -> _Rows:
    beside = sum(work.num_tokens for work in batch if work.is_beside)
    answers = sum(work.num_tokens for work in batch if work.branch is not None and not is_of_twin(work))
    return _Rows(answers, sum(work.num_tokens for work in batch) - answers - beside, beside)


def _has_ended(request: Request | Reading) -> bool:
    return request.handle is not None and request.handle.done


def _run(sequence: Sequence, start: int, end: int, *, num_logits: int) -> Run:
    # Copies: the sequence may grow or be forked while the pass runs.
    num_pages = len(sequence.pages)
    return Run(sequence.token_ids[start:end].copy(), sequence.pages[:num_pages].copy(), start, num_logits)


def _not_finite(request: Request, num_tokens: int) -> NumericalError:
    return NumericalError(
        f"request {request.request_id}: the model gave NaN or infinite logits after {num_tokens} tokens; "
        "nothing of it was cached; try float32, or check the weights"
    )
