"""What a pass computes: a token of each running answer, chunks of waiting prompts, and what is spare for others.

Where few answers run, guesses at their next tokens are tried in the same pass (see `guesses`): each token is drawn as
always, and a guess that equals it has its successor's logits already. What is spare beside answers goes to open prompts
(see `read_along`) and to exact twins (see `healing_work`), but for the time in which anybody waits for a first token. A
pass is for one identity of weights: requests with several adapters take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kvcomm.config import EngineConfig
from kvcomm.engine.grammar_turns import left_out
from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.guesses import CERTAIN, Found, repeated
from kvcomm.engine.healing_work import HealingWork, is_of_twin
from kvcomm.engine.in_flight import InFlight
from kvcomm.engine.passes import Work
from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.reading import Reading
from kvcomm.engine.request import Branch, Request
from kvcomm.engine.spare import Spare
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import PoolExhausted
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.runner import Run

MAX_SCORED = 128
"""Prompt tokens in a step of which all logits are wanted: a row of them takes more memory than its KV."""


class Rows(NamedTuple):
    """Rows of a pass: of answers, of prompts that somebody waits for, and beside them."""

    answers: int
    prompts: int
    beside: int


class Batches:
    """Makes the batch of the next step. Called under the engine's lock, by its thread."""

    def __init__(
        self,
        config: EngineConfig,
        page_size: int,
        in_flight: InFlight,
        *,
        spare: Spare,
        gain: GuessGain,
        tiering: Tiering,
        read_along: ReadAlong,
        healing: HealingWork,
        take_over: Callable[[Sequence[Request]], None],
        take_news: Callable[[Request], None],
    ) -> None:
        """Make one.

        Args:
            take_over: lets the exact twins of requests that wait for nothing else take over.
            take_news: shares with a request what has become known of its prompt since it was admitted.
        """
        self._config = config
        self._page_size = page_size
        self._in_flight = in_flight
        self._spare = spare
        self._gain = gain
        self._tiering = tiering
        self._read_along = read_along
        self._healing = healing
        self._take_over = take_over
        self._take_news = take_news
        self._turns: dict[str, int] = {}  # digests of weights, and the last pass that was for them
        self._num_passes = 0
        self._has_left_out = False  # of the step that is built, answers that could be decoded

    def build(self) -> list[Work]:
        """The next pass; empty where there is nothing to compute, or no page to compute it in."""
        stuck: list[Request] = []
        self._has_left_out = False
        running = self._in_flight.running
        for digest in self._in_turn(running):
            batch = self._batch_of([each for each in running if each.weights.digest == digest], stuck)
            if batch:
                self._num_passes += 1
                self._turns[digest] = self._num_passes
                return [*batch, *self._beside(digest, batch)]
        if not self._in_flight.is_any:
            for digest in self._read_along.digests():
                batch = self._beside(digest, [])
                if batch:
                    return batch
        stuck = [request for request in stuck if not request.handle.done]
        if stuck and not self._has_left_out:
            # Everybody waits for pages and nobody can return any: the youngest gives way.
            error = self._in_flight.nothing_to_wait_for(stuck[-1], PoolExhausted("while decoding"))
            self._in_flight.fail(stuck[-1], error)
        return []

    def timed(self, batch: Sequence[Work], seconds: float) -> None:
        """Learn from what a pass has taken: what is spare beside answers, and what guesses are worth."""
        rows = num_rows(batch)
        is_wanted = self._read_along.wants_more or any(map(self._healing.wants_more, self._in_flight.running))
        branches = [work.branch for work in batch if work.branch is not None]
        self._spare.passed(
            *rows,
            seconds,
            is_wanted=is_wanted,
            num_answers=len(branches),
            tokens_a_pass=min((branch.tokens_a_pass for branch in branches), default=1.0),
        )
        if rows.answers and not rows.prompts and not rows.beside:
            self._gain.passed(rows.answers, seconds)

    def _in_turn(self, running: Iterable[Request]) -> list[str]:
        """Digests of the weights of running requests; those that have waited longest come first."""
        digests = dict.fromkeys(request.weights.digest for request in running)
        self._turns = {digest: self._turns.get(digest, -1) for digest in digests}
        return sorted(digests, key=self._turns.__getitem__)

    def _beside(self, digest: str, batch: Sequence[Work]) -> list[Work]:
        """What is computed beside a batch, for nobody who waits: not where a first token is waited for.

        Open prompts come before twins: what they have not read by the end delays a first token, a twin a later one.
        """
        if self._in_flight.awaits_first_token:
            return []
        num_answer_rows, num_answers = num_rows(batch).answers, sum(work.branch is not None for work in batch)
        beside = self._read_along.work(digest, num_answer_rows, num_answers)
        num_left = self._spare.num_rows(num_answer_rows, num_answers) - sum(work.num_tokens for work in beside)
        for request in list(self._in_flight.running) if num_answer_rows else ():
            if request.weights.digest == digest:
                with self._in_flight.on_behalf_of(request):
                    work = self._healing.spare_work(request, num_left)
                    if work is not None:
                        num_left -= work.num_tokens
                        beside.append(work)
        return beside

    def _batch_of(self, running: Sequence[Request], stuck: list[Request]) -> list[Work]:
        """Work for one pass: of requests that have the same weights."""
        if any(request.healing is not None for request in running):
            self._take_over(running)
        batch = self._decode_work(running, stuck)
        budget = self._config.max_batch_tokens - sum(work.num_tokens for work in batch)
        if any(request.is_prefilled and not request.awaits_twin for request in self._in_flight.running):
            budget = min(budget, self._config.prefill_chunk)
        for request in running:
            if budget > 0 and (not request.is_prefilled or request.awaits_twin):
                with self._in_flight.on_behalf_of(request):
                    work = self._awaited_work(request, budget, stuck)
                    if work is not None:
                        budget -= work.num_tokens
                        batch.append(work)
        # Where one choice of a request has failed, the pages of its others are gone as well.
        return [work for work in batch if not _has_ended(work.request)]

    def _decode_work(self, running: Sequence[Request], stuck: list[Request]) -> list[Work]:
        batch: list[Work] = []
        answers = [(request, branch) for request in running for branch in request.active_branches]
        answers = [each for each in answers if each[0].is_prefilled and not each[0].awaits_twin]
        if self._in_flight.has_several_tenants:
            waiting = left_out(branch.grammar for _, branch in answers if branch.grammar and not branch.forced)
            answers = [(request, branch) for request, branch in answers if branch.grammar not in waiting]
            self._has_left_out = self._has_left_out or bool(waiting)
        if not answers:
            return batch
        found = [self._guesses(request, branch) for request, branch in answers]
        most = self._config.draft_rows - len(answers)
        shares = self._gain.shares([(each.num_matched, len(each.token_ids)) for each in found], most)
        for (request, branch), each, num_guesses in zip(answers, found, shares, strict=True):
            if request.handle.done:
                continue  # it, or another choice of it, has failed just now
            with self._in_flight.on_behalf_of(request):
                sequence = branch.sequence
                if self._in_flight.can_write(request, sequence, sequence.num_tokens, stuck):
                    guesses, branch.num_matched = each.token_ids[:num_guesses], each.num_matched
                    run = _run(sequence, sequence.num_computed, sequence.num_tokens, num_logits=1 + len(guesses))
                    run = run._replace(token_ids=np.concatenate([run.token_ids, guesses]))
                    batch.append(Work(request, branch, sequence, (run,)))
        return batch

    def _guesses(self, request: Request, branch: Branch) -> Found:
        """Guesses at the next tokens of a choice; none where looking for them has ended its request."""
        found = Found(branch.sequence.token_ids[:0], 0)
        if not request.handle.done:
            with self._in_flight.on_behalf_of(request):
                found = self._found(request, branch)
        return found

    def _found(self, request: Request, branch: Branch) -> Found:
        """Guesses at the next tokens of a choice: those its answer may still have, within the pages it owns."""
        num_wanted = request.sampling.max_new_tokens - len(branch.token_ids) - 1
        num_slots = branch.sequence.num_pages * self._page_size - branch.sequence.num_tokens
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
        if request.ask is not None and request.attempt is None:
            self._take_news(request)
            budget = min(budget, self._tiering.num_next(request, request.pending[0][0], request.num_prompt_tokens))
        runs: list[Run] = []
        for start, end in request.pending:
            if budget <= 0:
                break
            end = min(end, start + budget)
            budget -= end - start
            num_logits = end - start if is_scored else int(end == request.num_prompt_tokens)
            runs.append(_run(sequence, start, end, num_logits=num_logits))
        if not self._in_flight.can_write(request, sequence, runs[-1].end, stuck):
            return None
        runs = [run._replace(pages=sequence.pages.copy()) for run in runs]
        return Work(request, None, sequence, tuple(runs))


def num_rows(batch: Sequence[Work]) -> Rows:
    """Rows of a batch, by whom they are for."""
    beside = sum(work.num_tokens for work in batch if work.is_beside)
    answers = sum(work.num_tokens for work in batch if work.branch is not None and not is_of_twin(work))
    return Rows(answers, sum(work.num_tokens for work in batch) - answers - beside, beside)


def _has_ended(request: Request | Reading) -> bool:
    return request.handle is not None and request.handle.done


def _run(sequence: KVSequence, start: int, end: int, *, num_logits: int) -> Run:
    # Copies: the sequence may grow or be forked while the pass runs.
    num_pages = len(sequence.pages)
    return Run(sequence.token_ids[start:end].copy(), sequence.pages[:num_pages].copy(), start, num_logits)
