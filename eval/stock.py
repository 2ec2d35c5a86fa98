"""The model without kvcomm: transformers' own forward and `generate`, timed by the wall clock.

Attention is the model's own SDPA, decoding greedy on the default `DynamicCache`. Where only decoding is of interest it
starts from a cache filled beforehand, all but its last token, as `generate` wants to compute that one itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer


class Filled(NamedTuple):
    """A prompt and the cache of all its tokens but the last one, the same for every row of a batch."""

    token_ids: Tensor  # [num_rows, num_tokens] int64
    cache: DynamicCache


class Generated(NamedTuple):
    """One call of `generate`: the whole call, seconds between the first and the last new token, and the new tokens."""

    total_s: float
    decode_s: float
    token_ids: tuple[tuple[int, ...], ...]


@dataclass
class TokenClock(BaseStreamer):
    """Notes when each token is there; the prompt, which `generate` puts first, as well."""

    stamps: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to close."""


class Stock:
    """Forward and `generate` of a model on its device. The model's attention setting is set to SDPA."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        model.set_attn_implementation("sdpa")

    def prefill_s(self, prompt: Sequence[int], *, use_cache: bool) -> float:
        """Seconds of one forward pass that ends with the most probable next token."""
        start = time.perf_counter()
        with torch.inference_mode():
            logits = self._model(self._batch(prompt, 1), use_cache=use_cache, logits_to_keep=1).logits
            logits[0, -1].argmax().item()
        return time.perf_counter() - start

    def log_probs(self, prompt: Sequence[int]) -> Tensor:
        """Of the next token, [vocab_size] float32, on the CPU."""
        with torch.inference_mode():
            logits = self._model(self._batch(prompt, 1), use_cache=False, logits_to_keep=1).logits
        return logits[0, -1].float().log_softmax(-1).cpu()

    def fill(self, prompt: Sequence[int], *, num_rows: int = 1) -> Filled:
        """Compute a prompt once and repeat its cache for every row."""
        token_ids = self._batch(prompt, num_rows)
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad():  # not inference mode: `generate` goes on with these tensors outside of it
            self._model(token_ids[:1, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(num_rows)
        return Filled(token_ids, cache)

    def generate(self, prompt: Sequence[int], *, num_rows: int, num_new_tokens: int) -> Generated:
        """`generate` on copies of a prompt, prefill included."""
        return self._generate(self._batch(prompt, num_rows), None, num_new_tokens)

    def continue_from(self, filled: Filled, *, num_new_tokens: int) -> Generated:
        """`generate` from a copy of a filled cache."""
        return self._generate(filled.token_ids, copy.deepcopy(filled.cache), num_new_tokens)

    def _generate(self, token_ids: Tensor, cache: DynamicCache | None, num_new_tokens: int) -> Generated:
        clock = TokenClock()
        start = time.perf_counter()
        output = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            past_key_values=cache,
            streamer=clock,
            max_new_tokens=num_new_tokens,
            do_sample=False,
            # No token has this id, so nobody ends early; the check itself stays in.
            eos_token_id=self._model.config.get_text_config().vocab_size,
            pad_token_id=0,
        )
        total_s = time.perf_counter() - start
        new = output[:, token_ids.shape[1] :]
        assert new.shape[1] == num_new_tokens, (tuple(new.shape), num_new_tokens)
        decode_s = clock.stamps[-1] - clock.stamps[1]  # stamp 0 is the prompt's
        return Generated(total_s, decode_s, tuple(tuple(row) for row in new.tolist()))

    def _batch(self, prompt: Sequence[int], num_rows: int) -> Tensor:
        return torch.tensor([list(prompt)] * num_rows, device=self._model.device)
