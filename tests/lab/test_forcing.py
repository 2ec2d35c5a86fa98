"""Contexts computed in a certain way, and answers that they are made to write: against stock forwards."""

from __future__ import annotations

import pytest
import torch

from kvcomm import Engine, Rung, Segment
from kvcomm.errors import InvalidRequest, PromptTooLong
from kvcomm.lab.forcing import cold_context, moved_context, write_answer
from kvcomm.lab.moving import Fidelity
from tests.engine.conftest import some_tokens, stock_logits

TEXT = Segment(tuple(some_tokens(24, seed=1)), "text")
FORMER, READER = (Segment((11, 12, 13)), TEXT), (Segment((21, 22)), TEXT, Segment((31,)))
ANSWER = some_tokens(5, seed=2)
TOKENS = [token for part in READER for token in part.token_ids]


def test_a_cold_context_takes_nothing_from_the_cache(engine: Engine) -> None:
    engine.generate(READER, max_new_tokens=1)
    before = engine.cache.stats().num_free
    with cold_context(engine, READER) as context:
        assert context.fidelity is Fidelity.EXACT
        assert before - engine.cache.stats().num_free >= len(TOKENS) // engine.cache.page_size  # pages of its own


def test_what_contexts_would_have_drawn_from_is_the_stock_forwards(engine: Engine) -> None:
    with cold_context(engine, READER) as one, cold_context(engine, FORMER) as other:
        found = write_answer(engine, [one, other], ANSWER)
        assert one.tokens[-len(ANSWER) :] == other.tokens[-len(ANSWER) :] == tuple(ANSWER)
    for prompt, log_probs in zip((TOKENS, [11, 12, 13, *TEXT.token_ids]), found, strict=True):
        logits = stock_logits(engine.model, [*prompt, *ANSWER])[len(prompt) - 1 : -1]
        torch.testing.assert_close(log_probs, logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_moved_context_holds_moved_text(engine: Engine) -> None:
    engine.generate(FORMER, max_new_tokens=1)
    with moved_context(engine, READER, Rung("rotate")) as moved, cold_context(engine, READER) as cold:
        assert moved.fidelity is Fidelity.APPROXIMATE
        differences = [
            float((mine.values - theirs.values).abs().max())
            for mine, theirs in zip(moved.to_hf_cache().layers, cold.to_hf_cache().layers, strict=True)
        ]
        assert max(differences) > 1e-3


def test_what_is_refused_leaves_no_context(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="nobody"):
        moved_context(engine, READER, Rung("nobody"))
    with pytest.raises(PromptTooLong):
        cold_context(engine, [Segment((1,) * (engine.max_context + 1))])
    assert engine.contexts == ()
