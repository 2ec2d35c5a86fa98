"""Forgetting a tenant: what the engine knew of it goes, what others have and what is held stays."""

from __future__ import annotations

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.segments import Segment
from tests.stored import cached_by
from tests.tiny import tiny_model

PROMPT = [Segment(tuple(range(10, 40)), "system"), Segment(tuple(range(50, 70)), "question")]
GREEDY = SamplingParams(max_new_tokens=4)


def test_what_is_known_of_a_tenant_goes() -> None:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=1024)) as engine:
        for tenant in ("ann", "bob"):
            engine.cache.set_quota(cached_tokens=400, held_tokens=400, tenant=tenant)
            engine.context(PROMPT, tenant=tenant).release()
        held = engine.context(PROMPT, tenant="ann")
        num_bobs = engine.cache.num_cached(PROMPT, tenant="bob")
        assert num_bobs >= 48
        with held.fork() as fork:
            answer = fork.generate(GREEDY).text
        engine.forget("ann")
        engine.check_integrity()
        assert engine.cache.num_cached(PROMPT, tenant="ann") == 0
        assert engine.reuse.readers("ann") == []
        assert cached_by(engine, engine.namespace("ann")).quota_pages is None
        assert engine.cache.num_cached(PROMPT, tenant="bob") == num_bobs
        assert held.generate(GREEDY).text == answer  # what is held stays
        held.release()
        engine.forget("nobody")
        engine.forget("bob")
        engine.forget("ann")
        stats = engine.cache.stats()
        assert stats.num_free == stats.num_pages
