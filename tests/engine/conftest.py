"""An engine over a tiny model, and a cold run to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.reuse.cost import CostModel
from tests.tiny import TinyModel, tiny_model

SMALL = EngineConfig(page_size=4, pool_tokens=1024, max_batch_tokens=48, prefill_chunk=8)


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """One random model for a whole test file; nobody changes it."""
    return tiny_model()


@pytest.fixture
def engine(shared_model: TinyModel) -> Iterator[Engine]:
    """An engine with small pages, steps and pool. Nothing may be left in flight or leaked at the end."""
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as made:
        yield made
        assert not made.scheduler.has_work
        made.check_integrity()
        for context in made.contexts:
            context.release()
        made.cache.clear()
        assert made.cache.stats().num_free == made.pool.num_pages


def greedy(model: torch.nn.Module, prompt: Sequence[int], num_new: int) -> list[int]:
    """Greedy continuation by the stock forward, recomputed from scratch for every token."""
    token_ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_new):
            token_ids.append(int(stock_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def stock_logits(model: torch.nn.Module, token_ids: Sequence[int]) -> Tensor:
    """[num_tokens, vocab_size] of the stock forward without any cache."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def some_tokens(num: int, seed: int = 0) -> list[int]:
    """Ordinary token ids of the tiny tokenizer."""
    return [int(token) for token in np.random.default_rng(seed).integers(10, 250, num)]


ROWS_ONLY = CostModel(pass_s=0.0, row_s=1.0, pair_s=0.0, move_s=0.0)
"""A machine on which only computed tokens take time: decisions of tests must not depend on the clock."""
