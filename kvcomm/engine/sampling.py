"""From logits to the next token.

A sampler belongs to one choice of one request and has its own random generator, so what it draws depends on the
request's seed and on the logits alone, never on what else is in the batch or in the cache. The probability shaping
itself is done by transformers' logits processors. What may not be drawn at all, by the grammar or because the answer
is too short yet, has no mass left before any of them looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple, cast

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

from kvcomm.engine.grammar import Grammar
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import IntArray
from kvcomm.values import items, real_number, shown, text, told, truth_value, whole_number

MAX_CHOICES = 1024
"""Answers to one prompt at most: each takes memory of its own before anything is computed."""

MAX_BIASED = 4096
"""Tokens with a bias of their own."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Temperatures and penalties beyond these draw what they draw at these: their limit, without an infinity on the way."""


def _optional_whole_number(name: str, value: object) -> int | None:
    return None if value is None else whole_number(name, value)


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    return tuple(text(f"{name}[{at}]", item) for at, item in enumerate(items(name, value, "a tuple of strings")))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    found = items(name, value, "a tuple of token ids")
    return tuple(whole_number(f"{name}[{at}]", item) for at, item in enumerate(found))


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """By token id, ascending."""
    wanted = "a mapping of token ids to numbers"
    found: dict[int, float] = {}
    for pair in value.items() if isinstance(value, Mapping) else items(name, value, wanted):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidRequest(f"{name} must be {wanted}, not {told(value)}")
        found[whole_number(f"{name}, a token id,", pair[0])] = real_number(f"{name}[{pair[0]}]", pair[1])
    return tuple(sorted(found.items()))


def _grammar(name: str, value: object) -> Grammar | None:
    if isinstance(value, Grammar | None):
        return value
    raise InvalidRequest(f"{name} must be a Grammar, such as Grammar.json_schema(...), or None, not {told(value)}")


_BROUGHT: Mapping[str, Callable[[str, object], object]] = {
    "max_new_tokens": whole_number,
    "temperature": real_number,
    "top_k": whole_number,
    "top_p": real_number,
    "min_p": real_number,
    "repetition_penalty": real_number,
    "seed": _optional_whole_number,
    "stop": _stop_strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": truth_value,
    "n": whole_number,
    "logprobs": _optional_whole_number,
    "skip_special_tokens": truth_value,
    "frequency_penalty": real_number,
    "presence_penalty": real_number,
    "logit_bias": _biases,
    "min_tokens": whole_number,
    "prompt_logprobs": _optional_whole_number,
    "grammar": _grammar,
}
"""How each setting becomes a value of Python's own types, or is refused."""


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn. The defaults are greedy.

    Attributes:
        max_new_tokens: tokens generated at most; 0 only prefills.
        temperature: 0 takes the most probable token; otherwise logits are divided by it, and the smaller it is, the
            surer the most probable token comes.
        top_k, top_p, min_p: keep the k most probable tokens; the smallest set with mass top_p; tokens at least
            min_p times as probable as the best one. 0 (or -1), 1.0 and 0.0 switch them off.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
        seed: of the random draws; None: a fresh one per request.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        n: independent answers to the same prompt; answer i draws with seed + i.
        logprobs: report the log-probability of each token and of this many alternatives.
        skip_special_tokens: leave the texts of special tokens out of the answer's; the end token's always is.
        frequency_penalty, presence_penalty: taken from the logit of a token for every time that it stands in the
            answer, and once if it stands there at all.
        logit_bias: added to the logits of these tokens, by id; -100 and below all but forbid, 100 and above all but
            force.
        min_tokens: tokens before which neither the model's end tokens nor `stop_token_ids` come up, and in whose text
            no stop string counts. Where a grammar can only end, the answer ends all the same.
        prompt_logprobs: report the log-probability of every prompt token and of this many alternatives. The whole
            prompt is computed for it, whatever is cached.
        grammar: what the answer may be: the end comes where the grammar accepts, and at once where it can only end;
            what it forces is taken without a draw. An answer that `max_new_tokens` or a stop string cuts is a beginning
            of one. Control tokens come up where the grammar names them only.

    NumPy's scalars and whole numbers where a float is wanted are taken as what they say; lists become tuples.

    Raises:
        InvalidRequest: a value of another type or outside its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    skip_special_tokens: bool = True
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, bring in _BROUGHT.items():
            object.__setattr__(self, name, bring(name, getattr(self, name)))
        if self.top_k == -1:  # how other engines write "off"
            object.__setattr__(self, "top_k", 0)
        most = "None or in [0, 100]"
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or a positive number"),
            "top_k": (self.top_k >= 0, "0 or -1 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a positive number"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "None or in [0, 2**63)"),
            "stop": (all(self.stop), "a tuple of non-empty strings"),
            "n": (1 <= self.n <= MAX_CHOICES, f"in [1, {MAX_CHOICES}]"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, most),
            "frequency_penalty": (isfinite(self.frequency_penalty), "a finite number"),
            "presence_penalty": (isfinite(self.presence_penalty), "a finite number"),
            "logit_bias": (all(isfinite(bias) for _, bias in self.biases), "of finite numbers"),
            "min_tokens": (0 <= self.min_tokens <= self.max_new_tokens, "in [0, max_new_tokens]"),
            "prompt_logprobs": (self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 100, most),
        }
        if len(self.biases) > MAX_BIASED:
            raise InvalidRequest(f"logit_bias names {len(self.biases)} tokens; the most are {MAX_BIASED}")
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InvalidRequest(f"{name} must be {wanted}, not {shown(getattr(self, name))}")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` by token id, ascending."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every step, from logits as the model gives them."""
        penalties = self.frequency_penalty, self.presence_penalty, self.min_tokens
        is_plain = self.repetition_penalty == 1.0 and not any(penalties) and not self.biases
        return self.temperature == 0 and is_plain and self.grammar is None


class TopLogprob(NamedTuple):
    """One of the most probable tokens of a position, and its natural log-probability."""

    token_id: int
    logprob: float


class TokenLogprob(NamedTuple):
    """Natural log-probability of one generated token under the model, before any shaping; and of the most probable."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...]


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
        """Args:
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
