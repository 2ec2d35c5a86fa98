"""From logits to the next token.

A sampler belongs to one choice of one request and has its own random generator, so what it draws depends on the
request's seed and on the logits alone, never on what else is in the batch or in the cache. The probability shaping
itself is done by transformers' logits processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import IntArray
from kvcomm.values import items, real_number, shown, text, truth_value, whole_number

MAX_CHOICES = 1024
"""Answers to one prompt at most: each takes memory of its own before anything is computed."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Temperatures and penalties beyond these draw what they draw at these: their limit, without an infinity on the way."""


def _optional_whole_number(name: str, value: object) -> int | None:
    return None if value is None else whole_number(name, value)


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    return tuple(text(f"{name}[{at}]", item) for at, item in enumerate(items(name, value, "a tuple of strings")))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    found = items(name, value, "a tuple of token ids")
    return tuple(whole_number(f"{name}[{at}]", item) for at, item in enumerate(found))


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

    def __post_init__(self) -> None:
        for name, bring in _BROUGHT.items():
            object.__setattr__(self, name, bring(name, getattr(self, name)))
        if self.top_k == -1:  # how other engines write "off"
            object.__setattr__(self, "top_k", 0)
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
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, "None or in [0, 100]"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InvalidRequest(f"{name} must be {wanted}, not {shown(getattr(self, name))}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every step, from logits as the model gives them."""
        return self.temperature == 0 and self.repetition_penalty == 1.0


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

    def __init__(self, params: SamplingParams, choice: int, *, entropy: int) -> None:
        """`entropy` seeds the draws when the parameters have no seed."""
        self._params = params
        self._generator = torch.Generator()
        seed = entropy if params.seed is None else params.seed
        self._generator.manual_seed((seed + choice) % 2**63)
        self._processors = _processors(params)

    def sample(self, logits: Tensor, token_ids: IntArray) -> int:
        """The next token.

        Args:
            logits: [vocab_size], any float dtype; not modified.
            token_ids: prompt and answer so far.
        """
        if self._params.temperature == 0 and not self._processors:
            return int(logits.argmax())
        scores = logits.float().cpu()[None].clone()
        seen = torch.from_numpy(token_ids.astype("int64"))[None]
        for processor in self._processors:
            scores = processor(seen, scores)
        scores = scores[0]
        if self._params.temperature == 0:
            return int(scores.argmax())
        # Inverse CDF with one uniform number: tiny differences in logits move the result only at the very edges.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        below = torch.nextafter(cumulative[-1], cumulative.new_zeros(()))  # the product may round up to all of the mass
        return int(torch.searchsorted(cumulative, torch.minimum(threshold, below), right=True))


def token_logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token and of the `num_top` most probable ones; logits [vocab_size]."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(map(TopLogprob, ids.tolist(), values.tolist()))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def _processors(params: SamplingParams) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(_within_reach(params.repetition_penalty)))
    if params.temperature == 0:
        return processors
    processors.append(_BelowTheBest())
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(_within_reach(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


class _BelowTheBest(LogitsProcessor):
    """Shifts scores so that the best is 0, which draws the same; none of them can grow to infinity any more."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.clamp(max=torch.finfo(scores.dtype).max)  # a penalty may have taken them beyond
        return finite - finite.max(-1, keepdim=True).values


def _within_reach(factor: float) -> float:
    return min(max(factor, SMALLEST), LARGEST)
