"""Log-likelihoods that came through HTTP against those of the model itself, computed by its stock forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvcomm import Engine


def errors_of(engine: Engine, found: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each scored continuation, how far the log-likelihood found is from the model's own, in nats."""
    return [abs(each["loglikelihood"] - own_loglikelihood(engine, each)) for each in found]


@torch.inference_mode()
def own_loglikelihood(engine: Engine, asked: Mapping[str, Any]) -> float:
    """Log-probability of a continuation behind a context, as the harness splits the two."""
    before, behind = _split(asked["context"], asked["continuation"])
    whole = engine.tokenizer.encode(before + behind)
    num_before = len(engine.tokenizer.encode(before))
    logits = engine.model(input_ids=torch.tensor([whole], device=engine.model.device), use_cache=False).logits[0]
    logprobs = logits[num_before - 1 : -1].float().log_softmax(-1)
    wanted = torch.tensor(whole[num_before:], device=logprobs.device)
    return float(logprobs.gather(1, wanted[:, None]).sum())


def _split(context: str, continuation: str) -> tuple[str, str]:
    """White space between the two belongs to the continuation."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
