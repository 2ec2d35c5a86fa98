"""What becomes of what a pass has computed: prompts grow, tokens are drawn, answers end.

What is decoded does not depend on the batch: samplers belong to choices, and whatever is raised on behalf of a request
ends that request only (`InFlight.on_behalf_of`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from torch import Tensor

from kvcomm.engine.guess_gain import GuessGain
from kvcomm.engine.guesses import MAX_MATCH
from kvcomm.engine.healing_work import HealingWork, is_of_twin
from kvcomm.engine.in_flight import InFlight
from kvcomm.engine.offers import Offers
from kvcomm.engine.passes import Work
from kvcomm.engine.request import Branch, Request
from kvcomm.engine.sampler import token_logprob
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import NumericalError
from kvcomm.reuse.attempt import Attempt, ToCompute
from kvcomm.reuse.plan import Reason

logger = logging.getLogger("kvcomm.engine")

MAX_FORCED = 64
"""Forced tokens that are computed in one pass with the token before them."""


class Answers:
    """Commits what was computed for requests, and ends them. Called under the engine's lock, by its thread."""

    def __init__(
        self, in_flight: InFlight, offers: Offers, *, healing: HealingWork, gain: GuessGain, tiering: Tiering
    ) -> None:
        self._in_flight = in_flight
        self._offers = offers
        self._healing = healing
        self._gain = gain
        self._tiering = tiering

    def commit(self, work: Work, request: Request, logits: Tensor, finite: Sequence[bool]) -> None:
        """Take what a pass gave a request.

        Args:
            logits: [work.num_logits, vocab_size].
            finite: which of these rows hold numbers only.

        Raises:
            NumericalError: those that count do not; and whatever samplers, grammars and detokenizers raise.
        """
        if is_of_twin(work):
            self._healed(work, request, logits, finite)
        elif work.branch is not None:
            self._decoded(work, request, work.branch, logits, finite)
        else:
            self._prefilled(work, request, logits, finite)

    def begin(self, request: Request, logits: Tensor) -> None:
        """The prompt is computed: fork the sequence for further choices and draw everybody's first token.

        Args:
            logits: [vocab_size] behind the prompt.
        """
        self._offers.require_weights(request.weights)
        self._tiering.is_computed(request)
        self._offers.remember(request, request.sequence, whole=False)
        self._offers.publish(request)
        request.last_logits = logits.clone()
        self._healing.begin(request)
        request.clock.first_token = time.monotonic()
        if request.sampling.max_new_tokens == 0:
            for branch in request.branches:
                branch.finish_reason = "length"
            self._finish(request)
            return
        for branch in request.branches[1:]:
            _fork(request, branch)
        for branch in request.branches:
            self._accept(request, branch, logits)

    def take_over(self, running: Sequence[Request]) -> None:
        """Let the twins of requests that wait for nothing else take over."""
        for request in running:
            if request.awaits_twin:
                with self._in_flight.on_behalf_of(request):
                    if self._healing.has_caught_up(request):
                        self.let_take_over(request)

    def let_take_over(self, request: Request) -> None:
        """From now on all KV of a request is exact, for it and for others. What was served before is judged as such."""
        assert request.healing is not None
        self._offers.require_weights(request.weights)
        self._learn_from(request)
        request.healing.put_in_place()
        if request.on_healed is not None:
            request.on_healed()
        self._offers.healed(request)
        if not request.active_branches:
            self._finish(request)

    def without_moving(self, request: Request, attempt: Attempt, error: Exception) -> ToCompute:
        """Moving has failed, and the caller can be served without."""
        logger.error("moving KV failed: %r; request %d is computed exactly", error, request.request_id, exc_info=error)
        return attempt.retreat(Reason.FAILED)

    def carry_out(self, request: Request, todo: ToCompute) -> None:
        """Compute what an attempt at moved KV asks for next; one that gives up needs its sources no more."""
        request.carry_out(todo)
        if todo.moved_from is None:
            self._in_flight.drop_attempt(request)

    def _decoded(self, work: Work, request: Request, branch: Branch, logits: Tensor, finite: Sequence[bool]) -> None:
        """Draw the next token of a choice, and behind every guess that equals what was drawn one more."""
        num_right = self._draw(work, request, branch, logits, finite)
        if branch.finish_reason is None and 0 < branch.num_matched <= MAX_MATCH:
            self._gain.tried(branch.num_matched, len(finite) - 1, num_right)

    def _draw(self, work: Work, request: Request, branch: Branch, logits: Tensor, finite: Sequence[bool]) -> int:
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

    def _healed(self, work: Work, request: Request, logits: Tensor, finite: Sequence[bool]) -> None:
        """Count what was computed of an exact twin; where that was its last, its request goes on with it."""
        work.sequence.count(work.end)
        if not all(finite):
            raise _not_finite(request, work.end)
        if self._healing.has_caught_up(request):
            self.let_take_over(request)
        if work.branch is not None:
            self._accept(request, work.branch, logits[-1])

    def _prefilled(self, work: Work, request: Request, logits: Tensor, finite: Sequence[bool]) -> None:
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
            self.begin(request, logits[-1])
        else:
            self.carry_out(request, todo)

    def _advance(self, request: Request, attempt: Attempt) -> ToCompute | None:
        try:
            return attempt.advance()
        except Exception as error:
            return self.without_moving(request, attempt, error)

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
        self._offers.require_weights(request.weights)
        text += branch.detokenizer.finish()
        # The end of the text may hold a stop string that could have become something else until now.
        branch.finish_reason = finish_reason if branch.detokenizer.stopped is None else "stop"
        request.publish(branch, text)
        if branch.sequence is not request.sequence:
            self._offers.remember(request, branch.sequence, whole=True)
            branch.sequence.release()
        if not request.active_branches and not request.awaits_twin:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._in_flight.leave(request)
        sequence = request.sequence
        completion = request.completion()
        self._learn_from(request)
        self._offers.remember(request, sequence, whole=not request.is_lent)
        _keep_answer(request)
        self._offers.publish(request)
        self._in_flight.return_pages(request, sequence.num_tokens)
        if request.on_success is not None:
            request.on_success()
        self._in_flight.settle(request, completion)

    def _learn_from(self, request: Request) -> None:
        if request.healed_after is None:  # else that was done while what it was served was still there
            self._offers.learn_from(request)


def _fork(request: Request, branch: Branch) -> None:
    """Give a further choice the prompt's pages, and own ones behind it out of those that it has held so far."""
    branch.sequence.release()
    branch.sequence = request.sequence.fork()
    branch.sequence.make_writable(branch.sequence.num_computed, request.max_tokens)


def _keep_answer(request: Request) -> None:
    """Let the sequence end as the first answer does; what a stop string left of a token is still to be computed."""
    branch, sequence = request.branches[0], request.sequence
    kept = branch.detokenizer.num_kept_tokens
    sequence.truncate(request.num_prompt_tokens + kept)
    sequence.append(branch.detokenizer.answer_ids[kept:])


def _not_finite(request: Request, num_tokens: int) -> NumericalError:
    return NumericalError(
        f"request {request.request_id}: the model gave NaN or infinite logits after {num_tokens} tokens; "
        "nothing of it was cached; try float32, or check the weights"
    )
