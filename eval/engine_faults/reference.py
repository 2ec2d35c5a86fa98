"""What a cold run answers: stock forwards, and drawing written down a second time in float64 numpy.

An answer is drawn token by token from the logits of a stock model. The engine's own answer is only used as a guess at
the tokens, so that one forward gives the logits of all of them; every token is drawn all the same. Where rounding alone
decides (two logits within `TIE`, a random number at the very edge of a token's share), the engine's token counts as
drawn, and that this happened is counted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

from eval.engine_faults.subject import Subject, Weights
from kvcomm import SamplingParams

Scores = npt.NDArray[np.float64]

TIE = 2e-4
"""Logits closer than this are told apart by rounding: float32 logits of two right runs differ by up to 1e-4."""

EDGE = 1e-4
"""Share of probability by which rounding may move the edges of what is drawn from."""

MAX_REMEMBERED = 2000


@dataclass
class ColdAnswer:
    """A whole answer as it should be.

    Attributes:
        drawn: every token drawn but an end token, those of a stop string included.
        scores: [len(drawn), vocab_size], the logits that each was drawn from.
        text: as a caller sees it, without the stop string.
        stopped: whether a stop string ended it.
        num_ties: tokens about which rounding decided.
    """

    drawn: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    stopped: bool = False
    num_ties: int = 0


class _Drawn(NamedTuple):
    token_id: int
    alternatives: frozenset[int]


class Reference:
    """Cold answers of one subject. Thread-safe."""

    def __init__(self, subject: Subject, end_token_ids: frozenset[int]) -> None:
        self._subject = subject
        self._tokenizer: PreTrainedTokenizerFast = subject.tokenizer
        self._ends = end_token_ids
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[object, ...], Scores] = OrderedDict()

    def answer(
        self, weights: Weights, prompt: tuple[int, ...], params: SamplingParams, choice: int, guess: tuple[int, ...]
    ) -> ColdAnswer:
        """The answer of one choice.

        Args:
            params: with a seed, unless it takes the most probable tokens.
            guess: what the engine answered.
        """
        answer = ColdAnswer()
        draw = _Draw(params, choice)
        tokens = list(prompt)
        scores = self.logits(weights, (*prompt, *guess))[len(prompt) - 1 :]
        while len(answer.drawn) < int(params.max_new_tokens):
            at = len(answer.drawn)
            if tuple(answer.drawn) != guess[:at] or at >= len(scores):
                scores = np.concatenate([scores[:at], self.logits(weights, tuple(tokens))[-1:]])
            token, alternatives = draw(scores[at], tokens)
            given = guess[at] if at < len(guess) else None
            if given is not None and given != token and given in alternatives and tuple(answer.drawn) == guess[:at]:
                token = given
                answer.num_ties += 1
            if (token in self._ends and not params.ignore_eos) or token in params.stop_token_ids:
                answer.finish_reason = "stop"
                break
            tokens.append(token)
            answer.drawn.append(token)
            answer.scores.append(scores[at])
            if self._stop(answer, params.stop):
                return answer
        answer.text = self.decode(answer.drawn)
        return answer

    def decode(self, token_ids: list[int] | tuple[int, ...]) -> str:
        """The text of an answer."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    @torch.inference_mode()
    def logits(self, weights: Weights, tokens: tuple[int, ...]) -> Scores:
        """[len(tokens), vocab_size] of a stock forward."""
        key = (weights, tokens)
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
            output = self._subject.stock(weights)(torch.tensor([tokens]), use_cache=False)
            scores: Scores = output.logits[0].double().numpy()
            self._remembered[key] = scores
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return scores

    @torch.inference_mode()
    def cache(self, weights: Weights, tokens: tuple[int, ...]) -> DynamicCache:
        """Keys and values of a stock forward; fresh, so the caller may keep it."""
        with self._lock:
            output = self._subject.stock(weights)(torch.tensor([tokens]), use_cache=True)
        assert isinstance(output.past_key_values, DynamicCache)
        return output.past_key_values

    def _stop(self, answer: ColdAnswer, stop: tuple[str, ...]) -> bool:
        """Whether a stop string is complete now; the one that was complete first counts."""
        if not stop:
            return False
        text = self.decode(answer.drawn)
        hits = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
        if hits:
            answer.text, answer.finish_reason, answer.stopped = text[: min(hits)[1]], "stop", True
        return bool(hits)


class _Draw:
    """Draws the tokens of one choice; see `SamplingParams` for what the settings mean."""

    def __init__(self, params: SamplingParams, choice: int) -> None:
        self._temperature = float(params.temperature)
        self._top_k = int(params.top_k)
        self._top_p, self._min_p = float(params.top_p), float(params.min_p)
        self._penalty = float(params.repetition_penalty)
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed((int(params.seed) + choice) % 2**63)

    def __call__(self, scores: Scores, seen: list[int]) -> _Drawn:
        scores = self._penalized(scores, seen)
        close = frozenset(np.flatnonzero(scores > scores.max() - TIE).tolist())
        if self._temperature == 0:
            return _Drawn(int(scores.argmax()), close)
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        shares = self._shares(scores, 1.0)
        alternatives = [self._take(shares, uniform + step) for step in (-EDGE, EDGE)]
        for edge in (1 - EDGE, 1 + EDGE):  # of the sets that top_p and min_p leave
            moved = self._shares(scores, edge)
            alternatives += [self._take(moved, uniform + step) for step in (-EDGE, EDGE)]
        if self._top_k > 0 or self._temperature < TIE:
            alternatives += close
        return _Drawn(self._take(shares, uniform), frozenset(alternatives))

    def _penalized(self, scores: Scores, seen: list[int]) -> Scores:
        if self._penalty == 1:
            return scores
        scores, ids = scores.copy(), np.unique(np.array(seen))
        chosen = scores[ids]
        scores[ids] = np.where(chosen > 0, chosen / self._penalty, chosen * self._penalty)
        return scores

    def _shares(self, scores: Scores, edge: float) -> Scores:
        """Probabilities of what may be drawn; `edge` moves the limits of top_p and min_p."""
        with np.errstate(over="ignore"):  # minus infinity is what a tiny temperature means
            scores = (scores - scores.max()) / self._temperature
        if 0 < self._top_k < len(scores):
            scores = np.where(scores >= np.sort(scores)[-self._top_k], scores, -np.inf)
        shares = np.exp(scores)
        shares /= shares.sum()
        if self._top_p < 1:
            order = np.argsort(-shares, kind="stable")
            before = np.cumsum(shares[order]) - shares[order]
            shares[order[(before >= self._top_p * edge) & (np.arange(len(order)) > 0)]] = 0
            shares /= shares.sum()
        if self._min_p > 0:
            shares = np.where(shares >= min(self._min_p * edge, 1.0) * shares.max(), shares, 0)
            shares /= shares.sum()
        return shares

    def _take(self, shares: Scores, uniform: float) -> int:
        cumulative = np.cumsum(shares)
        wanted = min(max(uniform, 0.0), 1.0 - 1e-12) * cumulative[-1]
        return int(min(np.searchsorted(cumulative, wanted, side="right"), len(shares) - 1))
