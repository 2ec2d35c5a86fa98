"""From logits to the next token.

A sampler belongs to one choice of one request and has its own random generator, so what it draws depends on the
request's seed and on the logits alone, never on what else is in the batch or in the cache. The probability shaping
itself is done by transformers' logits processors. What may not be drawn at all, by the grammar or because the answer
is too short yet, has no mass left before any of them looks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.sampling import SamplingParams, TokenLogprob, TopLogprob
from kvcomm.model.attention.contract import IntArray

SMALLEST, LARGEST = 1e-30, 1e30
"""Temperatures and penalties beyond these draw what they draw at these: their limit, without an infinity on the way."""


class Sampler:
    """Draws the tokens of one choice."""

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        *,
        entropy: int,
        grammar: GrammarState | None = None,
        end_token_ids: Collection[int] = (),
    ) -> None:
        """Make one.

        Args:
            entropy: seeds the draws when the parameters have no seed.
            grammar: where the answer stands in it; this choice's own.
            end_token_ids: the model's.
        """
        self._params = params
        self._generator = torch.Generator()
        seed = entropy if params.seed is None else params.seed
        self._generator.manual_seed((seed + choice) % 2**63)
        self._processors = _processors(params)
        self._grammar = grammar
        self._ends = frozenset(end_token_ids)
        self._biased = torch.tensor([token_id for token_id, _ in params.biases], dtype=torch.int64)
        self._biases = torch.tensor([bias for _, bias in params.biases])
        self._penalizes = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._is_plain = params.is_greedy and grammar is None

    def sample(self, logits: Tensor, token_ids: IntArray, num_answer: int = 0) -> int | None:
        """The next token, an end token included; None where the grammar leaves nothing but to end.

        Args:
            logits: [vocab_size], any float dtype; not modified.
            token_ids: prompt and answer so far.
            num_answer: how many of them, at the end, are the answer's.

        Raises:
            InvalidRequest: the grammar costs more than a step may take.
        """
        if self._is_plain:
            return int(logits.argmax())
        forbidden = self._forbidden(len(logits), num_answer)
        if forbidden is not None and forbidden.numpy().all():  # which looks no further than the first that is not
            return None
        scores = logits.to("cpu", torch.float32, copy=True)[None]
        if len(self._biased):
            scores[0, self._biased] += self._biases
        if self._penalizes:
            self._penalize(scores[0], token_ids[len(token_ids) - num_answer :])
        seen = torch.from_numpy(token_ids.astype("int64"))[None]
        for processor in self._processors.before:
            scores = processor(seen, scores)
        if forbidden is not None:
            scores = torch.where(forbidden, -float("inf"), scores)
        for processor in self._processors.behind:
            scores = processor(seen, scores)
        scores = scores[0]
        if self._params.temperature == 0:
            return int(scores.argmax())
        # Inverse CDF with one uniform number: tiny differences in logits move the result only at the very edges.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        below = torch.nextafter(cumulative[-1], cumulative.new_zeros(()))  # the product may round up to all of the mass
        return int(torch.searchsorted(cumulative, torch.minimum(threshold, below), right=True))

    def ends(self, token_id: int) -> bool:
        """Whether a token that was drawn ends the answer and is none of its tokens."""
        if token_id in self._params.stop_token_ids:
            return True
        # A grammar may name an end token, which is a part of the answer then.
        is_end = token_id in self._ends and not self._params.ignore_eos
        return is_end and (self._grammar is None or self._grammar.is_complete)

    def _forbidden(self, vocab_size: int, num_answer: int) -> Tensor | None:
        """What may not be drawn, [vocab_size]; None: everything may."""
        is_short = num_answer < self._params.min_tokens
        if self._grammar is None:
            if not is_short:
                return None
            forbidden = torch.zeros(vocab_size, dtype=torch.bool)
            forbidden[[each for each in (*self._ends, *self._params.stop_token_ids) if each < vocab_size]] = True
            return forbidden
        forbidden = self._grammar.forbidden(with_ends=not is_short and not self._params.ignore_eos)
        stops = [each for each in self._params.stop_token_ids if each < vocab_size]
        if stops and (is_short or self._grammar.is_complete):
            forbidden[stops] = is_short
        return forbidden

    def _penalize(self, scores: Tensor, answer_ids: IntArray) -> None:
        ids, counts = np.unique(answer_ids, return_counts=True)
        penalties = self._params.frequency_penalty * counts + self._params.presence_penalty
        scores[torch.from_numpy(ids.astype("int64"))] -= torch.from_numpy(penalties).float()


def token_logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token and of the `num_top` most probable ones; logits [vocab_size]."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(map(TopLogprob, ids.tolist(), values.tolist()))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


class _Processors(NamedTuple):
    """What shapes the logits before tokens are forbidden, and what looks at those that are left."""

    before: LogitsProcessorList
    behind: LogitsProcessorList


def _processors(params: SamplingParams) -> _Processors:
    before, behind = LogitsProcessorList(), LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        before.append(RepetitionPenaltyLogitsProcessor(_within_reach(params.repetition_penalty)))
    if params.temperature == 0:
        return _Processors(before, behind)
    behind.append(_BelowTheBest())
    if params.temperature != 1.0:
        behind.append(TemperatureLogitsWarper(_within_reach(params.temperature)))
    if params.top_k:
        behind.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        behind.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        behind.append(MinPLogitsWarper(params.min_p))
    return _Processors(before, behind)


class _BelowTheBest(LogitsProcessor):
    """Shifts scores so that the best is 0, which draws the same; none of them can grow to infinity any more."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.clamp(max=torch.finfo(scores.dtype).max)  # a penalty may have taken them beyond
        return finite - finite.max(-1, keepdim=True).values


def _within_reach(factor: float) -> float:
    return min(max(factor, SMALLEST), LARGEST)
