"""An engine that is held stands still: requests, and what it does beside them."""

from __future__ import annotations

import pytest

from kvcomm import ReusePolicy, SamplingParams
from kvcomm.engine.engine import Engine
from tests.engine.conftest import some_tokens
from tests.limits import PATIENCE_S


def test_what_is_asked_while_it_is_held_is_done_afterwards(engine: Engine) -> None:
    """Nothing is computed in between, so nothing is cached; a moment is enough for a prompt as short as this."""
    prompt = some_tokens(20)
    with engine.held():
        handle = engine.submit(prompt, SamplingParams(max_new_tokens=1))
        assert not handle.wait(0.1)
        assert engine.cache.num_cached(prompt) == 0
    assert handle.wait(PATIENCE_S)
    assert engine.cache.num_cached(prompt) > 0


def test_nothing_is_learned_while_it_is_held(engine: Engine) -> None:
    """Idle work that waits (here: how long passes take) takes no time that is counted either."""
    engine.explain([engine.segment("a text", name="text")], policy=ReusePolicy(0.05, 0.9))
    assert engine.wait_idle(PATIENCE_S)
    before_s = engine.reuse.parts.idle.worked_s
    with engine.held():
        future = engine.reuse.learn([engine.segment("a text", name="text"), engine.segment("and more")])
        with pytest.raises(TimeoutError):
            future.result(0.2)
        assert engine.reuse.parts.idle.worked_s == before_s
    assert future.result(PATIENCE_S) == 0
    assert engine.wait_idle(PATIENCE_S)
    assert engine.reuse.parts.idle.worked_s > before_s
