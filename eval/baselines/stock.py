"""Transformers alone: its own forward and `generate` on the same token ids, one request after the other.

`stock` computes every prompt whole. `stock_prefix` keeps the KV of each agent's text before the first slot, its system
prompt and what the chat template puts around it, in a `DynamicCache` of its own, and starts every answer from a copy of
that: exact reuse as anybody can have it. The copy is part of the time to the first token. Decoding is greedy and ends
at the tokens at which the engine ends.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvcomm import Segment

CACHED, COMPUTED = "exact", "computed"


class StockAnswer(NamedTuple):
    """One answer.

    Attributes:
        token_ids: without the end token.
        first_logits: [vocab_size] float32, of the first token.
        num_cached: leading prompt tokens whose KV was there.
        ttft_s, total_s: from the call to the first and to the last token.
        kv_bytes: of all caches at the end of the answer, kept ones included.
    """

    token_ids: tuple[int, ...]
    first_logits: Tensor
    num_cached: int
    ttft_s: float
    total_s: float
    kv_bytes: int


@dataclass
class _FirstToken(BaseStreamer):
    """Notes when the first new token is there; `generate` puts the prompt first."""

    clock: Callable[[], float]
    stamps: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        if len(self.stamps) < 2:
            self.stamps.append(self.clock())

    def end(self) -> None:
        """Nothing to close."""


class StockServer:
    """Greedy answers of a model as transformers gives them."""

    def __init__(
        self,
        model: PreTrainedModel,
        end_token_ids: Iterable[int],
        *,
        keeps_prefixes: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Make one.

        Args:
            keeps_prefixes: whether the KV of prompts' static beginnings is kept.
        """
        self._model: Any = model
        self._ends = sorted(end_token_ids)
        self._prefixes: dict[tuple[int, ...], DynamicCache] | None = {} if keeps_prefixes else None
        self._clock = clock

    def prepare(self, prompt: Sequence[Segment]) -> None:
        """Keep the beginning of a prompt, if that is to be done and has not been yet."""
        prefix = _static_beginning(prompt)
        if self._prefixes is None or not prefix or prefix in self._prefixes:
            return
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad():  # not inference mode: `generate` goes on with these tensors outside of it
            self._model(self._row(prefix), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._prefixes[prefix] = cache

    def answer(self, prompt: Sequence[Segment], max_new_tokens: int, *, ignore_eos: bool = False) -> StockAnswer:
        """Answer a prompt greedily; its beginning is kept before the clock starts."""
        self.prepare(prompt)
        token_ids = [token for segment in prompt for token in segment.token_ids]
        first, start = _FirstToken(self._clock), self._clock()
        kept = (self._prefixes or {}).get(_static_beginning(prompt))
        output = self._model.generate(
            self._row(token_ids),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long, device=self._model.device),
            past_key_values=copy.deepcopy(kept) if kept is not None else DynamicCache(config=self._model.config),
            streamer=first,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # Where nothing ends an answer, an id that no token has: the check itself stays in.
            eos_token_id=[self._model.config.get_text_config().vocab_size] if ignore_eos else self._ends,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        total_s = self._clock() - start
        new = output.sequences[0, len(token_ids) :].tolist()
        if new and not ignore_eos and new[-1] in self._ends:
            del new[-1]
        num_cached = 0 if kept is None else kept.get_seq_length()
        held = [*(self._prefixes or {}).values(), output.past_key_values]
        return StockAnswer(
            tuple(new),
            output.logits[0][0].float(),
            num_cached,
            first.stamps[1] - start,
            total_s,
            sum(_num_bytes(cache) for cache in held),
        )

    @torch.inference_mode()
    def log_probs(self, prompt: Sequence[Segment], continuation: Sequence[int]) -> Tensor:
        """Over a continuation that is forced, [num_continuation, vocab_size] float32, by the way that answers take."""
        self.prepare(prompt)
        token_ids = [token for segment in prompt for token in segment.token_ids]
        kept = (self._prefixes or {}).get(_static_beginning(prompt))
        cache = copy.deepcopy(kept) if kept is not None else DynamicCache(config=self._model.config)
        new = [*token_ids, *continuation[:-1]][cache.get_seq_length() :]
        output = self._model(self._row(new), past_key_values=cache, use_cache=True, logits_to_keep=len(continuation))
        log_probs: Tensor = output.logits[0].float().log_softmax(-1)
        return log_probs

    def _row(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], device=self._model.device)


def _static_beginning(prompt: Sequence[Segment]) -> tuple[int, ...]:
    """Tokens before the first slot; none where there is no slot: the last token has to be computed."""
    found: list[int] = []
    for segment in prompt:
        if segment.name is not None:
            return tuple(found)
        found += segment.token_ids
    return ()


def _num_bytes(cache: DynamicCache) -> int:
    layers: list[Any] = list(cache.layers)
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)
