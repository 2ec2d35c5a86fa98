"""An explanation is the plan that the request then gets, and asking for it changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvcomm.align.ladder import Rung
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.plan import SpanKind
from tests.engine.conftest import ROWS_ONLY, SMALL, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, SAMPLING, ask, earn, prompt
from tests.stored import cached_by, stored_by
from tests.tiny import TinyModel


def test_exact_plans_come_true(engine: Engine) -> None:
    """In a pool that is full most of the time, so that reasons differ; prompts that share beginnings of any length."""
    draw = np.random.default_rng(0)
    trunks, reasons = [some_tokens(350, seed=1000 + index) for index in range(4)], set()
    for index in range(60):
        length, tail = int(draw.integers(0, 350)), some_tokens(int(draw.integers(1, 60)), seed=index % 7)
        ids = [*trunks[index % 4][:length], *(tail if index % 3 else [])] or tail
        free, usage = engine.cache.stats(), cached_by(engine, engine.namespace())
        explained = engine.explain(ids)
        assert (engine.cache.stats(), cached_by(engine, engine.namespace())) == (free, usage)
        engine.check_integrity()
        made = engine.generate(ids, max_new_tokens=1).usage
        assert explained.plan.spans == made.spans
        assert explained.share is None
        reasons |= set(explained.plan.reasons)
    assert reasons >= {"new", "evicted", "last_token"}


def test_asking_does_not_keep_a_prefix_from_eviction(shared_model: TinyModel) -> None:
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as engine:
        old, new, other = (some_tokens(400, seed=seed) for seed in (1, 2, 3))
        for ids in (old, new):
            engine.generate(ids, max_new_tokens=1)
        engine.explain(old)
        engine.generate(other, max_new_tokens=1)
        assert engine.cache.num_cached(new) > engine.cache.num_cached(old)


def test_plans_of_moved_text_come_true(learning: Engine) -> None:
    """At every stage of what is known: no source, too few examples, and then moved."""
    reasons = set()
    for seed in range(6):
        for role in (ROLE_A, ROLE_B):
            explained = learning.explain(prompt(role, seed), policy=LOOSE)
            assert explained.plan.spans == ask(learning, role, seed, LOOSE).usage.spans
            reasons |= set(explained.plan.reasons)
        assert learning.wait_idle(PATIENCE_S)
    assert reasons == {"no_source", "uncalibrated", "new", "glue", "last_token"} - ({"last_token"} - reasons)
    ask(learning, ROLE_A, 99, LOOSE)
    asked = [standing.num_requests for standing in learning.reuse.readers()]
    explained = learning.explain(prompt(ROLE_B, 99), policy=LOOSE)
    refused = learning.explain(prompt(ROLE_B, 99), policy=replace(LOOSE, max_divergence=1e-12))
    assert [standing.num_requests for standing in learning.reuse.readers()] == asked
    assert refused.plan.reasons["bound"] == 90
    assert refused.share is None
    assert explained.share == 0.0
    assert explained.predicted is not None
    assert explained.prefill_s is not None
    assert explained.cold_s is not None
    assert explained.prefill_s < explained.cold_s
    assert explained.plan.spans == ask(learning, ROLE_B, 99, LOOSE).usage.spans


def test_a_rung_that_computes_some_is_explained_with_what_it_takes(learning: Engine) -> None:
    policy = replace(LOOSE, rungs=(Rung("token", 0.3),))
    earn(learning, policy)
    ask(learning, ROLE_A, 99, policy)
    explained = learning.explain(prompt(ROLE_B, 99), policy=policy)
    assert (explained.share, explained.plan.num_tokens(SpanKind.ALIGNED)) == (0.3, 90)
    # Glue and tail are looked at, and computed once more behind the rung's tokens.
    assert explained.prefill_s == ROWS_ONLY.compute_s([(0, 27 + 2 * 5)])
    usage = ask(learning, ROLE_B, 99, policy).usage
    assert (usage.aligned_tokens, usage.reasons["rung"]) == (63, 27)


def test_asking_makes_nobody_known(learning: Engine) -> None:
    """Bug: whoever was asked about stood among the readers from then on, and was the last to be forgotten."""
    ask(learning, ROLE_A, 0, LOOSE)
    assert learning.wait_idle(PATIENCE_S)
    known = [standing.reader for standing in learning.reuse.readers()]
    learning.explain(prompt(ROLE_B, 0), policy=LOOSE)
    assert [standing.reader for standing in learning.reuse.readers()] == known


def test_costs_are_measured_when_first_asked_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.reuse.parts.cost, "_measure", lambda: ROWS_ONLY)
    ids = some_tokens(20)
    assert engine.explain(ids).cold_s is None
    assert engine.wait_idle(PATIENCE_S)
    assert engine.explain(ids).cold_s == ROWS_ONLY.compute_s([(0, 20)])


def test_what_cannot_be_asked_cannot_be_explained(engine: Engine) -> None:
    for bad in ([], [10**6], some_tokens(513)):
        with pytest.raises(InvalidRequest):
            engine.explain(bad)


def test_a_quota_bounds_renditions_too(engine: Engine) -> None:
    """A tenant cannot hold in its segments' renditions what it may not hold as cached prefixes."""
    engine.cache.set_quota(cached_tokens=40, tenant="ann")
    for seed in range(8):
        parts = [Segment(tuple(some_tokens(9, seed=seed))), Segment(tuple(some_tokens(24, seed=100 + seed)), "text")]
        engine.generate([*parts, Segment((11, 12))], SAMPLING, tenant="ann")
        held = sum(each.pages.size for each in stored_by(engine, "ann"))
        assert held * engine.config.page_size <= 40
    engine.cache.set_quota(tenant="ann")
    engine.generate([Segment(tuple(some_tokens(90)), "text"), Segment((11, 12))], SAMPLING, tenant="ann")
    assert len(stored_by(engine, "ann")) > 1
