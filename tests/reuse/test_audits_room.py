"""Pages of an audit, on which the bound depends, against a request that needs all there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import PoolExhausted
from tests.engine.conftest import ROWS_ONLY, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import ROLE_A, ROLE_B, ask
from tests.reuse.test_planner import EXACT, POLICY, know
from tests.tiny import TinyModel

POOL_TOKENS = 400


def audited(engine: Engine) -> None:
    """An audit waits, and nothing else is in flight."""
    engine.reuse.parts.cost.model = ROWS_ONLY
    know(engine, prior=30)
    ask(engine, ROLE_A, 1, EXACT)
    assert ask(engine, ROLE_B, 1, replace(POLICY, audit=1.0)).usage.aligned_tokens == 90
    assert len(engine.reuse.parts.idle.jobs) == 1


def test_a_request_that_needs_the_whole_pool_waits_for_an_audit(shared_model: TinyModel) -> None:
    """Bug: it was told that contexts held the pages, while nobody had one."""
    config = EngineConfig(pool_tokens=POOL_TOKENS, idle_after_s=1e6, learning_share=0.0)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        audited(engine)
        handle = engine.submit(some_tokens(POOL_TOKENS - 8), max_new_tokens=8, ignore_eos=True)
        assert len(handle.result(PATIENCE_S).token_ids) == 8
        assert not engine.reuse.parts.idle.jobs
        assert engine.reuse.parts.learner.auditor.num_audits == 1
        engine.check_integrity()


def test_what_no_audit_makes_room_for_is_told_behind_it(shared_model: TinyModel) -> None:
    config = EngineConfig(pool_tokens=POOL_TOKENS, idle_after_s=1e6, learning_share=0.0)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        audited(engine)
        with engine.context(some_tokens(20)), pytest.raises(PoolExhausted, match="held by contexts"):
            engine.submit(some_tokens(POOL_TOKENS - 8), max_new_tokens=8).result(PATIENCE_S)
        engine.check_integrity()
