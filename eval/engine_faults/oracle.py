"""Judges answers and errors: every answer given as exact equals the cold one, every error has a reason of its own.

An answer on moved KV (`usage.aligned_tokens`) is not compared; its neighbours are. An error is right if the fault that
was thrown in stands behind it, if its caller asked for it (a cancel, an engine closed, values that are refused), or if
the memory was really short. Anything else is a finding. What may be refused is decided here from sizes alone, without
asking the engine.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from eval.engine_faults.faults import POINTS, Faults
from eval.engine_faults.findings import Findings
from eval.engine_faults.records import Asked
from eval.engine_faults.reference import ColdAnswer, Reference
from eval.engine_faults.subject import MAX_CONTEXT
from kvcomm import Chunk, Completion, KVCommError
from kvcomm.errors import (
    ContextBusy,
    ContextReleased,
    EngineClosed,
    InvalidRequest,
    NumericalError,
    PoolExhausted,
    PoolTooSmall,
    PromptTooLong,
    QuotaExceeded,
    RequestCancelled,
    SourceFailed,
)
from kvcomm.lab.answers import Choice

LOGPROB_TOLERANCE = 2e-3


class Circumstances(Protocol):
    """Under which requests were made; see `World`, which is one."""

    weights_have_changed: bool
    is_closed: bool
    tenants_with_quota: set[str]

    @property
    def num_pages(self) -> int:
        """Of the pool."""

    def num_pages_at_most(self, asked: Asked) -> int:
        """That a request can need."""

    def num_pages_at_least(self, asked: Asked) -> int:
        """That a request must need."""

    def was_held_since(self, moment: float) -> bool:
        """Whether somebody held pages at or after a moment."""

    def note_lost(self, error: BaseException) -> None:
        """The engine is of no use any more."""


class Oracle:
    """One for each engine that lives; `world` says what it was asked to hold."""

    def __init__(self, world: Circumstances, reference: Reference, faults: Faults, findings: Findings) -> None:
        self._world = world
        self._reference = reference
        self._faults = faults
        self._findings = findings
        self._charged: Counter[int] = Counter()
        self._lock = threading.Lock()

    def judge_answer(self, asked: Asked, completion: Completion, chunks: Iterable[Chunk] | None = None) -> None:
        """A request has been answered."""
        if asked.opened is not None:
            asked.opened.settle()
            self._findings.count("followers")
            self._findings.count("read_along_tokens", completion.usage.read_along_tokens)
        if asked.is_invalid:
            self._findings.wrong("a value of the wrong kind was taken", f"{asked}")
            return
        choices = completion.choices
        if [choice.index for choice in choices] != list(range(int(asked.params.n))):
            self._findings.wrong("not n choices", f"{asked}: {completion}")
            return
        if chunks is not None:
            self._judge_chunks(asked, choices, list(chunks))
        usage = completion.usage
        parts = usage.exact_tokens + usage.aligned_tokens + usage.computed_tokens
        if (usage.prompt_tokens, parts) != (len(asked.tokens), len(asked.tokens)):
            self._findings.wrong("usage does not add up", f"{asked}: {usage}")
        if asked.is_first and usage.exact_tokens:
            self._findings.wrong("a new tenant found something cached", f"{asked}: {usage}")
        if usage.aligned_tokens:
            self._findings.count("approximate")
            if not asked.may_move:
                self._findings.wrong("moved KV for a caller who wants exact answers", f"{asked}: {usage}")
            return
        for choice in choices:
            self._judge_choice(asked, choice)

    def judge_error(self, asked: Asked, error: BaseException) -> None:
        """A request, or the call that was to make it, has ended with an error."""
        self._findings.count("errors")
        if asked.opened is not None:
            asked.opened.settle()
        reason = self._reason(asked, error)
        if reason is None:
            what = f"an error without a reason: {type(error).__name__}"
            self._findings.wrong(what, f"{error!r} for {asked}; cause {error.__cause__!r}")
        else:
            self._findings.count(f"error: {reason}")

    def excuses(self, error: BaseException) -> bool:
        """Whether a fault stands behind an error of a call that is no request, or the engine was lost."""
        return self._is_fault(error, is_request=False) or self._is_lost(error)

    def note_lost(self, error: BaseException) -> None:
        """An engine that nobody closed says that it is closed, or hangs."""
        self._world.note_lost(error)

    def fired_since(self, asked: Asked, *points: str) -> bool:
        """Whether a fault of one of these points has fired since a request was made."""
        return any(self._faults.fired[point] > asked.num_fired[point] for point in points)

    def _reason(self, asked: Asked, error: BaseException) -> str | None:
        if isinstance(error, SourceFailed) and asked.opened is not None:
            is_right = asked.is_hurried or asked.opened.has_failed_source()
            return "SourceFailed" if is_right else None  # what its source failed of is judged there
        if self._is_fault(error, is_request=True):
            return "thrown in"
        if self._is_lost(error):
            return "engine lost"
        reasons = {
            EngineClosed: self._world.is_closed,
            RequestCancelled: asked.was_cancelled,
            ContextBusy: asked.context_was_busy,
            ContextReleased: asked.context_was_released,
            NumericalError: self.fired_since(asked, "model.logits"),
            PromptTooLong: len(asked.tokens) + asked.num_followed + int(asked.params.max_new_tokens) > MAX_CONTEXT,
            QuotaExceeded: asked.tenant in self._world.tenants_with_quota,
            PoolTooSmall: self._world.num_pages_at_most(asked) > self._world.num_pages,
        }
        for kind, holds in reasons.items():
            if type(error) is kind:
                return kind.__name__ if holds else None
        if isinstance(error, PoolExhausted):
            never_fits = self._world.num_pages_at_least(asked) > self._world.num_pages
            is_short = self._world.was_held_since(asked.submitted) or self.fired_since(
                asked, "pool.allocate", "pool.copy_page"
            )
            return "PoolExhausted" if is_short and not never_fits else None
        if isinstance(error, InvalidRequest) and asked.is_invalid:
            return "InvalidRequest"
        is_by_name = isinstance(error, KVCommError) and type(error) is not KVCommError
        return "other weights" if asked.held_other_weights and is_by_name else None

    def _is_lost(self, error: BaseException) -> bool:
        if isinstance(error, EngineClosed) and not self._world.is_closed:
            self.note_lost(error)
            return True
        return False

    def _is_fault(self, error: BaseException, *, is_request: bool) -> bool:
        if isinstance(error, EngineClosed):
            return False
        fault = self._faults.behind(error)
        if fault is None:
            return False
        if not (isinstance(error, KVCommError) or error is fault):
            return False  # a third error in place of the one that was thrown in
        with self._lock:
            self._charged[id(fault)] += is_request
            num_charged = self._charged[id(fault)]
        point = self._faults.point_of(fault)
        if num_charged > 1 and POINTS[point].hits_one:
            self._findings.wrong(
                "one choice's fault failed several requests", f"{error!r} of {point}: {num_charged} requests"
            )
        return True

    def _judge_chunks(self, asked: Asked, choices: Iterable[Choice], chunks: list[Chunk]) -> None:
        for choice in choices:
            own = [chunk for chunk in chunks if chunk.choice == choice.index]
            text = "".join(chunk.text for chunk in own)
            if text != choice.text:
                self._findings.wrong("chunks and completion disagree on text", f"{asked}: {text!r}, {choice}")
            tokens = [token for chunk in own for token in chunk.token_ids]
            if int(asked.params.max_new_tokens) and tokens != list(choice.token_ids):
                what = "chunks and completion disagree on token ids"
                self._findings.wrong(what, f"{asked}: {tokens}, {choice}")

    def _judge_choice(self, asked: Asked, choice: Choice) -> None:
        params = asked.params
        if params.temperature > 0 and params.seed is None:
            self._findings.count("unseeded")
            return
        cold = self._reference.answer(asked.weights, asked.tokens, params, choice.index, choice.token_ids)
        self._findings.count("compared")
        self._findings.count("ties", cold.num_ties)
        self._findings.count("compared_tokens", len(cold.drawn))
        found = f"{asked}: choice {choice}, cold run {cold.drawn} {cold.text!r} {cold.finish_reason}"
        num_kept = self._num_kept(cold)
        given = list(choice.token_ids)
        if choice.finish_reason != cold.finish_reason:
            self._findings.wrong("another finish reason", found)
        elif given[:num_kept] != cold.drawn[:num_kept] or (not cold.stopped and len(given) != num_kept):
            since = " after weights have changed" if self._world.weights_have_changed else ""
            self._findings.wrong(f"an answer differs{since}", found)
        elif choice.text != cold.text:
            self._findings.wrong("the text differs", found)
        elif self._reference.decode(given) != cold.text:
            self._findings.wrong("token ids and text disagree", found)
        else:
            self._judge_logprobs(asked, choice, cold, num_kept)

    def _num_kept(self, cold: ColdAnswer) -> int:
        """Tokens that certainly belong to an answer: those before the one in which a stop string begins."""
        if not cold.stopped:
            return len(cold.drawn)
        ends = range(len(cold.drawn) + 1)
        return max(end for end in ends if cold.text.startswith(self._reference.decode(cold.drawn[:end])))

    def _judge_logprobs(self, asked: Asked, choice: Choice, cold: ColdAnswer, num_kept: int) -> None:
        num_top = asked.params.logprobs
        if num_top is None:
            return
        given = choice.logprobs
        fewest = num_kept if cold.stopped else len(choice.token_ids)  # what a stop string left of a token has none
        if given is None or not fewest <= len(given) <= len(choice.token_ids):
            self._findings.wrong("not one log-probability for each token drawn", f"{asked}: {choice}")
            return
        for each, scores, token in zip(given[:num_kept], cold.scores, cold.drawn, strict=False):
            logprobs = scores - scores.max()
            logprobs = logprobs - math.log(float(np.exp(logprobs).sum()))
            wanted = np.sort(logprobs)[::-1][: int(num_top)]
            values = [value for _, value in each.top]
            is_right = (
                each.token_id == token
                and abs(each.logprob - logprobs[token]) <= LOGPROB_TOLERANCE
                and len(values) == len(wanted)
                and np.allclose(values, wanted, rtol=0, atol=LOGPROB_TOLERANCE)
                and all(abs(logprobs[id] - value) <= LOGPROB_TOLERANCE for id, value in each.top)
            )
            if not is_right:
                self._findings.wrong("log-probabilities differ", f"{asked}: {each}, cold run {wanted.tolist()}")
                return
