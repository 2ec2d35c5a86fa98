"""What an engine has learned about moving, as evaluations see it."""

from __future__ import annotations

import pytest

from kvcomm import Engine, Rung, Segment
from kvcomm.lab.bounds import Level, Measured, Pair, add_pair, pairs_of
from kvcomm.lab.moving import anchor_bytes, learning_s, reader_of
from kvcomm.lab.priors import head_weights
from tests.engine.conftest import some_tokens

TEXT = Segment(tuple(some_tokens(24, seed=1)), "text")
READER = reader_of((Segment((21, 22)), TEXT))
PAIRS = [Pair({Rung("rotate"): Measured(nats, None)}, {"rotate": 0.0}) for nats in (0.1, 0.2)]


def test_pairs_are_the_readers_and_the_tenants(engine: Engine) -> None:
    for pair in PAIRS:
        add_pair(engine, READER, pair)
    assert list(pairs_of(engine, Level.OWN, READER.digest)) == PAIRS
    assert list(pairs_of(engine, Level.POOL)) == PAIRS
    assert list(pairs_of(engine, Level.OWN, "somebody else")) == list(pairs_of(engine, Level.PRIOR)) == []
    assert list(pairs_of(engine, Level.POOL, tenant="another")) == []
    assert [len(standing.pairs) for standing in engine.reuse.readers()] == [2]


def test_what_learning_takes_and_keeps(engine: Engine) -> None:
    assert (anchor_bytes(engine), head_weights(engine)) == (0, None)
    engine.generate((Segment((11, 12, 13)), TEXT), max_new_tokens=1)
    engine.generate((Segment((21, 22)), TEXT), max_new_tokens=1)
    engine.wait_idle()
    before_s = learning_s(engine)
    kept = engine.reuse.learn((Segment((21, 22)), TEXT)).result()
    assert kept > 0
    engine.wait_idle()
    assert learning_s(engine) > before_s
    assert anchor_bytes(engine) > 0
    assert anchor_bytes(engine, tenant="another") == 0


@pytest.mark.parametrize("level", [Level.POOL, Level.PRIOR])
def test_a_reader_changes_nothing_for_all_readers(engine: Engine, level: Level) -> None:
    add_pair(engine, READER, PAIRS[0])
    assert list(pairs_of(engine, level, READER.digest)) == list(pairs_of(engine, level))
