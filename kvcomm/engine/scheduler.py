"""Continuous batching: every step computes one token of each running answer and chunks of waiting prompts.

Where few answers run, a step also tries guesses at their next tokens (see `guesses`): each token is drawn as always,
and a guess that equals it has its successor's logits already.

A step is: drop what was cancelled, admit, write moved KV, build the batch, forward, commit. The lock is held while
state changes and released during the forward pass, so contexts can be forked and requests submitted meanwhile. Only
this class and idle work call the runner and write pages, and only from one thread. A request is admitted when the pages
for its longest possible answer are there (evicting cached prefixes if need be), so a running request is not thrown out
again; a full pool queues. A pass is for one identity of weights: requests with several adapters take turns. What is
decoded does not depend on the batch: samplers belong to choices, and a failing row fails its own request only.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence as AnySequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters, Turns
from kvcomm.engine.explanation import Explanation
from kvcomm.engine.guesses import repeated
from kvcomm.engine.learner import Learner
from kvcomm.engine.plan import Reason, exact_plan
from kvcomm.engine.request import ANSWER, Branch, Request
from kvcomm.engine.reuse import Reuse
from kvcomm.engine.sampling import token_logprob
from kvcomm.engine.study import IdleWork
from kvcomm.errors import (
    EngineClosed,
    NumericalError,
    PoolExhausted,
    PoolTooSmall,
    RequestCancelled,
    UnknownAdapter,
    UnsupportedModel,
    WeightsChanged,
)
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import ModelRunner, Run, Watch

logger = logging.getLogger("kvcomm.engine")

EXPIRE_INTERVAL_S = 1.0


class Work(NamedTuple):
    """Runs of one sequence in a step, ascending, and whom they are for; `branch` is None while the prompt is prefilled.

    Only the last run may give logits.
    """

    request: Request
    branch: Branch | None
    sequence: Sequence
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(len(run.token_ids) for run in self.runs)

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.runs[-1].end

    @property
    def num_logits(self) -> int:
        """Rows of logits this work gives."""
        return self.runs[-1].num_logits


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
        reuse: Reuse,
        learner: Learner,
        idle: IdleWork,
        lock: threading.RLock,
        *,
        adapters: Adapters,
        end_token_ids: frozenset[int],
    ) -> None:
        self.lock = lock
        self._reuse = reuse
        self._learner = learner
        self._idle = idle
        self._config = config
        self._memory = memory
        self._pool = memory.pool
        self._tree = memory.tree
        self._runner = runner
        self._adapters = adapters
        self._turns = Turns()
        self._has_looked = False  # closely at the weights, since the last pass
        self._end_token_ids = end_token_ids
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._closed: EngineClosed | None = None
        self._next_expire_s = 0.0

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests admitted and not yet settled."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would find anything to do."""
        return bool(self._waiting or self._running)

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
            needed = -(-request.max_tokens // self._pool.page_size)
            if needed > self._pool.num_pages:
                raise PoolTooSmall(
                    f"prompt and answer of up to {request.max_tokens} tokens need {needed} pages of "
                    f"{self._pool.page_size}; the whole pool has {self._pool.num_pages}: "
                    "lower max_new_tokens, shorten the prompt or raise pool_tokens"
                )
            self._waiting.append(request)

    def explain(self, request: Request) -> Explanation:
        """What would be planned for a trial request if it were admitted now; nothing is changed or kept."""
        with self.lock:
            try:
                self._plan(request)
                return self._reuse.explain(request)
            finally:
                self._reuse.drop(request)
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

    def step(self) -> None:
        """Compute one batch and commit it."""
        self._has_looked = False
        self._prepare_reuse()
        with self.lock:
            self._drop_cancelled()
            self._expire()
            self._admit()
        self._assemble()
        with self.lock:
            batch = self._build_batch()
        if not batch:
            return
        self._has_looked = False
        try:
            with self._runner.serving(batch[0].request.weights):
                logits = self._runner.forward([run for work in batch for run in work.runs], watch=self._watch(batch))
        except Exception as error:
            # Whatever the model raises belongs to the callers of this batch; the engine itself goes on.
            with self.lock:
                for request in {id(work.request): work.request for work in batch}.values():
                    self._fail(request, error)
            return
        with self.lock:
            self._commit(batch, logits)

    def _prepare_reuse(self) -> None:
        if any(self._reuse.may_reuse(request) for request in list(self._waiting)):
            with suppress(PoolExhausted):  # no room for a trial now: nothing is moved until there is
                self._reuse.prepare()

    def _assemble(self) -> None:
        """Write moved KV for requests that were just admitted: outside the lock, to pages that are theirs alone."""
        for request in list(self._running):
            if request.approximation is None or request.approximation.is_assembled:
                continue
            try:
                with self._runner.serving(request.weights):
                    self._reuse.assemble(request)
            except Exception as error:  # the caller can be served without
                logger.exception("moving KV failed: %r; request %d is computed exactly", error, request.request_id)
                request.approximation.distance = math.inf
                request.approximation.is_assembled = True
            with self.lock:
                if not request.handle.done:
                    self._reuse.accept(request)

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
            if self._is_prefix_in_flight(request) or self._reuse.waits_for_source(request, self._running):
                continue
            try:
                self._adapters.renew(request)
                self._take_pages(request)
            except (UnknownAdapter, UnsupportedModel, WeightsChanged) as error:
                self._fail(request, error)
                continue
            except PoolExhausted as error:
                if not self._running:
                    self._fail(request, self._nothing_to_wait_for(request, error))
                    continue
                return
            self._waiting.remove(request)
            self._running.append(request)
            request.clock.admitted = time.monotonic()
            if request.ready_logits is not None:
                self._begin_answers(request, request.ready_logits)

    def _is_prefix_in_flight(self, request: Request) -> bool:
        """Whether a running prefill will soon leave at least a page in the tree that this request could share."""
        if not self._uses_tree(request):
            return False
        own = request.sequence
        for other in self._running:
            if other.is_prefilled or other.namespace != request.namespace or not self._uses_tree(other):
                continue
            num_shared = _num_common(own.token_ids[:-1], other.sequence.token_ids)
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
        """Share what the tree has of the prompt and allocate the rest, or change nothing."""
        sequence = request.sequence
        self._plan(request)
        try:
            self._make_writable(sequence, sequence.num_computed, request.max_tokens)
        except PoolExhausted:
            self._reuse.drop(request)
            if request.is_lent:
                sequence.trim()
            else:
                sequence.release()
            raise

    def _plan(self, request: Request) -> None:
        """Share what the tree has of the prompt, and decide about the rest."""
        sequence = request.sequence
        if request.ready_logits is None:
            # The last token is always computed: its logits are not in the cache.
            sequence.rewind(min(sequence.num_computed, sequence.num_tokens - 1))
        reason = Reason.NEW if self._may_read_cache(request) else Reason.CACHE_OFF
        if self._uses_tree(request):
            reason = self._share_from_tree(request)
        if self._reuse.may_reuse(request) and request.ready_logits is None:
            request.plan = self._reuse.plan(request, reason)
        else:
            request.plan = exact_plan(sequence.num_computed, sequence.num_tokens, reason)
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

    def _nothing_to_wait_for(self, request: Request, error: PoolExhausted) -> PoolExhausted:
        return PoolExhausted(
            f"request {request.request_id} needs pages for {request.max_tokens} tokens and nothing is running that "
            f"could return some: {self._pool.num_free} of {self._pool.num_pages} pages are free, the others are held "
            f"by contexts or pinned; release contexts or raise pool_tokens ({error})"
        )

    def _build_batch(self) -> list[Work]:
        stuck: list[Request] = []
        for digest in self._turns.order(self._running):
            batch = self._batch_of([each for each in self._running if each.weights.digest == digest], stuck)
            if batch:
                self._turns.taken(digest)
                return batch
        if stuck:
            # Everybody waits for pages and nobody can return any: the youngest gives way.
            victim = stuck[-1]
            self._fail(victim, self._nothing_to_wait_for(victim, PoolExhausted("while decoding")))
        return []

    def _batch_of(self, running: AnySequence[Request], stuck: list[Request]) -> list[Work]:
        """Work for one pass: of requests that have the same weights."""
        batch = self._decode_work(running, stuck)
        budget = self._config.max_batch_tokens - sum(work.num_tokens for work in batch)
        if any(request.is_prefilled for request in self._running):
            budget = min(budget, self._config.prefill_chunk)
        for request in running:
            if budget > 0 and not request.is_prefilled:
                work = self._prefill_work(request, budget, stuck)
                if work is not None:
                    budget -= work.num_tokens
                    batch.append(work)
        return batch

    def _decode_work(self, running: AnySequence[Request], stuck: list[Request]) -> list[Work]:
        batch: list[Work] = []
        answers = [(request, branch) for request in running for branch in request.active_branches]
        answers = [(request, branch) for request, branch in answers if request.is_prefilled]
        num_spare = self._config.draft_rows - len(answers)
        for index, (request, branch) in enumerate(answers):
            sequence = branch.sequence
            if self._can_write(request, sequence, sequence.num_tokens, stuck):
                # The first guesses at an answer are right most often, so all answers have their share.
                guesses = self._guesses(request, branch, math.ceil(num_spare / (len(answers) - index)))
                num_spare -= len(guesses)
                run = _run(sequence, sequence.num_computed, sequence.num_tokens, num_logits=1 + len(guesses))
                run = run._replace(token_ids=np.concatenate([run.token_ids, guesses]))
                batch.append(Work(request, branch, sequence, (run,)))
        return batch

    def _guesses(self, request: Request, branch: Branch, num_rows: int) -> IntArray:
        """Guesses at the next tokens of a choice: those its answer may still have, within the pages it owns."""
        num_wanted = request.sampling.max_new_tokens - len(branch.token_ids) - 1
        num_slots = branch.sequence.num_pages * self._pool.page_size - branch.sequence.num_tokens
        return repeated(branch.sequence.token_ids, min(num_rows, num_wanted, num_slots))

    def _prefill_work(self, request: Request, budget: int, stuck: list[Request]) -> Work | None:
        sequence = request.sequence
        runs: list[Run] = []
        for start, end in request.pending:
            if budget <= 0:
                break
            end = min(end, start + budget)
            budget -= end - start
            runs.append(_run(sequence, start, end, num_logits=int(end == request.num_prompt_tokens)))
        if not self._can_write(request, sequence, runs[-1].end, stuck):
            return None
        runs = [run._replace(pages=sequence.pages.copy()) for run in runs]
        return Work(request, None, sequence, tuple(runs))

    def _can_write(self, request: Request, sequence: Sequence, end: int, stuck: list[Request]) -> bool:
        """Own the pages up to `end`; a fork taken since admission may share the page that is written next."""
        try:
            self._make_writable(sequence, sequence.num_computed, end)
        except PoolExhausted:
            stuck.append(request)
            return False
        return True

    def _make_writable(self, sequence: Sequence, start: int, end: int) -> None:
        """As the memory does it; studies that wait for idle time give way to requests."""
        while True:
            try:
                self._memory.make_writable(sequence, start, end)
                return
            except PoolExhausted:
                if not self._idle.give_way():
                    raise

    def _watch(self, batch: AnySequence[Work]) -> Watch | None:
        """What looks on during the pass, for requests that choose their rung's tokens by it."""
        watches: list[Watch] = []
        row = 0
        for work in batch:
            for run in work.runs:
                watch = None if work.branch is not None else self._reuse.watch(work.request, run, row)
                if watch is not None:
                    watches.append(watch)
                row += len(run.token_ids)
        if not watches:
            return None

        def watch_all(layer_id: int, query: Tensor, scale: float) -> None:
            for watch in watches:
                watch(layer_id, query, scale)

        return watch_all

    def _commit(self, batch: AnySequence[Work], logits: Tensor) -> None:
        finite = finite_rows(logits)
        row = 0
        for work in batch:
            first, row = row, row + work.num_logits
            if work.request.handle.done:
                continue  # closed meanwhile, or another choice of the same request failed in this very step
            if work.branch is not None:
                self._decoded(work, work.branch, logits[first:row], finite[first:row])
                continue
            self._prefilled(work)
            if work.num_logits == 0:
                continue
            if not finite[first]:
                self._fail(work.request, _not_finite(work.request, work.end))
            elif self._reuse.check(work.request):
                self._begin_answers(work.request, logits[first])

    def _decoded(self, work: Work, branch: Branch, logits: Tensor, finite: AnySequence[bool]) -> None:
        """Draw the next token of a choice, and behind every guess that equals what was drawn one more."""
        run, sequence = work.runs[0], work.sequence
        for index, is_finite in enumerate(finite):
            end = run.start + index + 1
            if index:
                if branch.finish_reason is not None or sequence.token_ids[end - 1] != run.token_ids[index]:
                    return
                branch.num_guessed += 1
            sequence.num_computed = end
            if not is_finite:
                self._fail(work.request, _not_finite(work.request, end))
                return
            self._accept(work.request, branch, logits[index])

    def _prefilled(self, work: Work) -> None:
        """Count what was computed of a prompt. Behind moved KV nothing counts before all of it is in place."""
        request, sequence = work.request, work.sequence
        request.pending = [(max(start, work.end), end) for start, end in request.pending if end > work.end]
        if request.approximation is None or not request.pending:
            sequence.num_computed = work.end

    def _begin_answers(self, request: Request, logits: Tensor) -> None:
        """The prompt is computed: fork the sequence for further choices and draw everybody's first token."""
        if not self._is_of_its_weights(request):
            return
        self._remember(request, request.sequence, whole=False)
        self._publish(request)
        request.last_logits = logits.clone()
        request.clock.first_token = time.monotonic()
        for branch in request.branches[1:]:
            branch.sequence = request.sequence.fork()
        for branch in request.branches:
            if request.sampling.max_new_tokens == 0:
                branch.finish_reason = "length"
            elif not request.handle.done:
                self._accept(request, branch, logits)
        if request.sampling.max_new_tokens == 0:
            self._finish(request)

    def _accept(self, request: Request, branch: Branch, logits: Tensor) -> None:
        """Draw the next token of a choice and see whether it ends."""
        sampling = request.sampling
        token_id = branch.sampler.sample(logits, branch.sequence.token_ids)
        is_end = not sampling.ignore_eos and token_id in self._end_token_ids
        if is_end or token_id in sampling.stop_token_ids:
            self._finish_branch(request, branch, "stop", ())
            return
        branch.token_ids.append(token_id)
        branch.sequence.append([token_id])
        if sampling.logprobs is not None:
            branch.logprobs.append(token_logprob(logits, token_id, sampling.logprobs))
        text = branch.detokenizer.push(token_id)
        if branch.detokenizer.stopped is not None:
            self._finish_branch(request, branch, "stop", (token_id,), text)
        elif len(branch.token_ids) == sampling.max_new_tokens:
            self._finish_branch(request, branch, "length", (token_id,), text)
        else:
            request.publish(branch, text, (token_id,))

    def _finish_branch(
        self, request: Request, branch: Branch, finish_reason: str, token_ids: tuple[int, ...], text: str = ""
    ) -> None:
        branch.finish_reason = finish_reason
        if not self._is_of_its_weights(request):
            return
        request.publish(branch, text + branch.detokenizer.finish(), token_ids)
        if branch.sequence is not request.sequence:
            self._remember(request, branch.sequence, whole=True)
            branch.sequence.release()
        if not request.active_branches:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._leave(request)
        sequence = request.sequence
        self._publish(request)
        self._learner.after(request)
        self._reuse.release(request)
        self._remember(request, sequence, whole=not request.is_lent)
        if request.is_lent:
            sequence.truncate(request.num_prompt_tokens + request.branches[0].detokenizer.num_kept_tokens)
            sequence.trim()
        else:
            sequence.release()
        if request.on_success is not None:
            request.on_success()
        request.handle.settle(request.completion())

    def _fail(self, request: Request, error: BaseException) -> None:
        """Settle with an error: own pages are returned, a lent sequence is rolled back."""
        self._leave(request)
        self._reuse.release(request)
        for branch in request.branches:
            if branch.sequence is not request.sequence:
                branch.sequence.release()
        if request.is_lent:
            request.sequence.truncate(request.num_kept_tokens)
            request.sequence.trim()
        else:
            request.sequence.release()
        request.handle.settle(error)

    def _is_of_its_weights(self, request: Request) -> bool:
        """Before anything computed is offered to others: look closely; a request whose weights are gone fails."""
        if not self._has_looked:
            try:
                self._adapters.live.require(request.weights, closely=True)
            except (UnsupportedModel, WeightsChanged) as error:
                self._fail(request, error)
                return False
            self._has_looked = True
        return True

    def _leave(self, request: Request) -> None:
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)

    def _publish(self, request: Request) -> None:
        """Let other contexts move what this one has computed so far: prompt, and behind it the first answer."""
        if not self._config.cache:
            return
        kept = tuple(request.branches[0].token_ids[: request.branches[0].detokenizer.num_kept_tokens])
        answer = (Segment(kept, ANSWER),) if kept and not request.active_branches else ()
        segments = (*request.segments, *answer)
        if any(segment.name is not None for segment in segments):
            self._reuse.publish(request, segments)

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


def finite_rows(logits: Tensor) -> list[bool]:
    """Which rows of [num_rows, vocab_size] hold neither NaN nor infinity."""
    # They survive a sum, and summing takes a twentieth of testing every logit. The reverse does not hold: a model that
    # hides tokens behind the least number of its dtype overflows the sum.
    finite = logits.sum(-1, dtype=torch.float32).isfinite()
    if not bool(finite.all()):
        finite = logits.isfinite().all(-1)
    rows: list[bool] = finite.tolist()
    return rows


def _run(sequence: Sequence, start: int, end: int, *, num_logits: int) -> Run:
    # Copies: the sequence may grow or be forked while the pass runs.
    num_pages = len(sequence.pages)
    return Run(sequence.token_ids[start:end].copy(), sequence.pages[:num_pages].copy(), start, num_logits)


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    num = min(len(first), len(second))
    differs = first[:num] != second[:num]
    return int(differs.argmax()) if differs.any() else num


def _not_finite(request: Request, num_tokens: int) -> NumericalError:
    return NumericalError(
        f"request {request.request_id}: the model gave NaN or infinite logits after {num_tokens} tokens; "
        "nothing of it was cached; try float32, or check the weights"
    )
