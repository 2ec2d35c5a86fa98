"""How far a request's KV is from the exact one: measured by the stock forward of the model, not by the engine.

Both KV states are copied out of their contexts up to the prompt's last token; the exact greedy continuation is forced
behind each. So neither the planner, nor its audits, nor the engine's forward has a say in what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomm import Context

WORST = 1e6
"""Nats that are written down where the divergence is not finite."""


def divergence(
    model: PreTrainedModel, served: Context, exact: Context, num_prompt: int, answer: Sequence[int]
) -> float:
    """Mean KL(exact || served) over the continuation, nats.

    Args:
        served, exact: contexts that begin with the same prompt.
        num_prompt: its tokens.
        answer: token ids of the exact greedy continuation; at least one.
    """
    assert served.tokens[:num_prompt] == exact.tokens[:num_prompt], "two prompts"
    forced = [exact.tokens[num_prompt - 1], *answer[:-1]]
    truth, got = (_log_probs(model, _prompt_cache(each, num_prompt), forced) for each in (exact, served))
    value = float((truth.exp() * (truth - got)).sum(-1).mean())
    return max(value, 0.0) if math.isfinite(value) else WORST


def _prompt_cache(context: Context, num_prompt: int) -> DynamicCache:
    """The KV of all but the last token of the prompt that a context begins with."""
    cache = context.to_hf_cache(whole=True)
    behind = cache.get_seq_length() - (num_prompt - 1)
    if behind > 0:
        cache.crop(-behind)
    return cache


@torch.inference_mode()
def _log_probs(model: PreTrainedModel, cache: DynamicCache, forced: Sequence[int]) -> Tensor:
    token_ids = torch.tensor([list(forced)], device=model.device)
    logits: Tensor = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(-1)
