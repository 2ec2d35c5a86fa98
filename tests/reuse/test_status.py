"""What is told of a reader, and what examples give it: on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvcomm.align.calibration import Measured, Pair, Sources, pairs_needed
from kvcomm.align.ladder import CORRECTED, DEFAULT_RUNGS, TURNED, Rung
from kvcomm.align.readers import Reader, reader_of
from kvcomm.align.standings import Audit, Level
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.warming import Done
from kvcomm.errors import EngineClosed, InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY, some_tokens
from tests.tiny import tiny_model

POLICY = ReusePolicy(max_divergence=0.1, confidence=0.9)
LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.7)
NUM_NEEDED = 9
"""Pairs at confidence 0.9."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, policy=POLICY, prior=None, config=EngineConfig(page_size=4)) as engine:
        engine.reuse.parts.cost.model = ROWS_ONLY
        yield engine
        engine.check_integrity()


def prompt(text: int, template: int = 1) -> list[Segment]:
    """A text, always the same ids for a number, behind a template."""
    return [Segment(tuple(some_tokens(9, template))), Segment(tuple(some_tokens(40, 100 + text)), "text")]


def whole(text: int, template: int = 1) -> list[Segment]:
    """With a question behind it."""
    return [*prompt(text, template), Segment(tuple(some_tokens(7, 50 + template)))]


def pair(turned: float, corrected: float | None = None) -> Pair:
    """The same nats at every rung of an estimator."""
    measured = {rung: Measured(turned) for rung in TURNED}
    if corrected is not None:
        measured |= {rung: Measured(corrected) for rung in CORRECTED}
    return Pair(measured)


def add(engine: Engine, reader: Reader, *pairs: Pair) -> None:
    with engine.lock:
        for each in pairs:
            engine.reuse.parts.book.add(engine.namespace(), reader, each)


def test_a_reader_never_seen_stands_where_the_pool_puts_it_and_is_not_made_known(engine: Engine) -> None:
    add(engine, reader_of(whole(0, template=2)), *[pair(0.01)] * NUM_NEEDED)
    status = engine.reuse.status(whole(0))
    assert status.reader == reader_of(whole(0)).digest
    assert (status.num_pairs(Level.OWN), status.num_pairs(Level.POOL)) == (0, NUM_NEEDED)
    assert (status.level, status.rung, status.share) == (Level.POOL, str(TURNED[-1]), 0.0)
    assert [each.reader for each in engine.reuse.status()] == [reader_of(whole(0, template=2)).digest]


def test_what_is_missing_is_told_in_numbers(engine: Engine) -> None:
    reader = reader_of(whole(0))
    add(engine, reader, *[pair(0.01)] * 3)
    add(engine, reader_of(whole(0, template=2)), *[pair(0.01)] * 4)
    status = engine.reuse.status(reader)
    assert status.reason is Reason.UNCALIBRATED
    assert [
        (each.level, each.estimator, each.num_pairs, each.num_needed, each.num_missing) for each in status.levels
    ] == [
        (Level.OWN, "token", 0, NUM_NEEDED, NUM_NEEDED),
        (Level.OWN, "rotate", 3, NUM_NEEDED, 6),
        (Level.POOL, "token", 0, NUM_NEEDED, NUM_NEEDED),
        (Level.POOL, "rotate", 7, NUM_NEEDED, 2),
        (Level.PRIOR, "token", 0, NUM_NEEDED, NUM_NEEDED),
        (Level.PRIOR, "rotate", 0, NUM_NEEDED, NUM_NEEDED),
    ]
    assert {each.num_settled for each in status.levels if each.level is not Level.PRIOR} == {pairs_needed(0.05)}
    assert status.missing == ("own 3 of 9 pairs", "pool 7 of 9 pairs", "prior 0 of 9 pairs")
    assert "computed (uncalibrated); own 3 of 9 pairs; pool 7 of 9 pairs" in repr(status)
    assert json.loads(json.dumps(status.to_dict()))["levels"][1]["num_pairs"] == 3
    own = engine.reuse.status(reader, policy=ReusePolicy(0.1, 0.9, basis="own"))
    assert {each.level for each in own.levels} == {Level.OWN}


def test_pooled_pairs_of_another_kind_do_not_count(engine: Engine) -> None:
    """They were once counted together for a newcomer, and a level seemed to have enough that decided about nobody."""
    unread = Sources(num_segments=1, num_unread=1, num_tokens=40)
    add(engine, reader_of(whole(0, template=2)), *[pair(0.01)] * 4, *[replace(pair(0.01), sources=unread)] * 6)
    newcomer = engine.reuse.status(whole(0))
    assert newcomer.num_pairs(Level.POOL) == 6
    assert newcomer.reason is Reason.UNCALIBRATED
    reader = reader_of(whole(0, template=3))
    add(engine, reader, pair(0.01))  # its sources have read all
    assert engine.reuse.status(reader).num_pairs(Level.POOL) == 5
    add(engine, reader_of(whole(0, template=2)), *[replace(pair(0.01), sources=unread)] * 3)
    assert engine.reuse.status(whole(0)).level is Level.POOL
    assert engine.reuse.status(reader).reason is Reason.UNCALIBRATED


def test_no_rung_that_holds_is_told_as_such(engine: Engine) -> None:
    reader = reader_of(whole(0))
    add(engine, reader, *[pair(0.3)] * NUM_NEEDED)
    assert engine.reuse.status(reader).reason is Reason.BOUND
    assert engine.reuse.status(reader, policy=ReusePolicy(0.5, 0.9)).reason is None
    exact = engine.reuse.status(reader, policy=ReusePolicy.exact())
    assert (exact.bound, exact.levels, exact.level) == (None, (), None)
    assert "exact reuse only" in repr(exact)


def test_audits_move_the_working_delta_and_bar_a_level(engine: Engine) -> None:
    reader, bound = reader_of(whole(0)), POLICY.bound
    assert bound is not None
    add(engine, reader_of(whole(0, template=2)), *[pair(0.01)] * 40)
    with engine.lock:
        for number in range(12):
            audit = Audit(float(number), 1.0, 0.01, bound, Level.POOL)
            engine.reuse.parts.book.audited(engine.namespace(), reader, audit)
    status = engine.reuse.status(reader)
    pool = [each for each in status.levels if each.level is Level.POOL]
    assert {(each.is_barred, each.num_audits, each.num_violations) for each in pool} == {(True, 12, 12)}
    assert all(each.working_delta < 0 for each in pool)
    assert (status.num_audits, status.num_violations) == (12, 12)
    assert status.reason is Reason.BREAKER
    assert any(each.startswith("pool") and each.endswith("barred by audits") for each in status.missing)


def test_an_unknown_reader_is_one_line(engine: Engine) -> None:
    add(engine, reader_of(whole(0)), pair(0.01))
    add(engine, reader_of(whole(0, template=2)), pair(0.01))
    digest = reader_of(whole(0)).digest
    assert engine.reuse.status(digest[:10]).reader == digest
    for unknown in ("nobody", Reader("nobody")):
        with pytest.raises(InvalidRequest, match="no reader 'nobody' among 2 of tenant 'default'"):
            engine.reuse.status(unknown)
    with pytest.raises(InvalidRequest, match="no reader '' among 2"):
        engine.reuse.status("")
    with pytest.raises(InvalidRequest, match=r"no reader .* among 0 of tenant 'other'"):
        engine.reuse.status(digest, tenant="other")
    with pytest.raises(InvalidRequest, match="nothing of this prompt can be moved"):
        engine.reuse.status([Segment((5, 6))])
    with pytest.raises(InvalidRequest, match="unknown estimator 'magic'"):
        engine.reuse.status(digest, policy=ReusePolicy(0.1, 0.9, rungs=(Rung("magic"),)))


def test_prompts_are_learned_from_in_order(engine: Engine) -> None:
    """The first reader of a text has no source; the other one has, and is measured before it teaches."""
    told: list[Done] = []
    prompts = [each for text in range(4) for each in (whole(text), whole(text, template=2))]
    first, second = engine.warm(prompts, LOOSE, progress=told.append)
    assert (first.status.reader, second.status.reader) == tuple(reader_of(whole(0, each)).digest for each in (1, 2))
    assert (first.num_prompts, first.num_pairs, first.num_tokens) == (4, 0, 0)
    assert (second.num_prompts, second.num_pairs) == (4, 4)
    (edge,) = second.status.edges
    assert second.num_tokens == edge.num_tokens > 64
    assert (edge.slot, edge.source_slot, edge.num_needed) == ("text", "text", 64)
    assert told[-1] == Done(16, 16, "learning")
    assert second.level is Level.OWN
    assert "4 pairs" in repr(second)
    served = engine.generate(whole(0), max_new_tokens=4, policy=LOOSE).usage
    assert served.aligned_tokens == 0  # all of it is cached exactly
    moved = engine.generate(whole(0, template=3)[:2] + whole(0, 2)[2:], max_new_tokens=4, policy=LOOSE).usage
    assert moved.aligned_tokens > 0  # a third reader, by the pool
    engine.wait_idle()


def test_all_rungs_are_measured_however_much_is_known(engine: Engine) -> None:
    prompts = [each for text in range(6) for each in (whole(text), whole(text, template=2))]
    engine.warm(prompts, LOOSE)
    (standing,) = [each for each in engine.reuse.readers() if each.pairs]
    assert set([*standing.pairs][-1].measured) == set(DEFAULT_RUNGS)


def test_bad_prompts_run_nothing(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="there are no examples"):
        engine.warm([], LOOSE)
    with pytest.raises(InvalidRequest, match="nothing of prompt 2 can be moved"):
        engine.warm([whole(0), [Segment((5, 6))]], LOOSE)
    with pytest.raises(InvalidRequest, match="exact reuse only"):
        engine.warm([whole(0)], ReusePolicy.exact())
    with pytest.raises(InvalidRequest, match="progress must be"):
        engine.warm([whole(0)], LOOSE, progress="yes")  # type: ignore[arg-type]
    assert engine.cache.stats().num_cached == 0
    engine.close()
    with pytest.raises(EngineClosed):
        engine.warm([whole(0)], LOOSE)


def test_a_lesson_that_fails_is_settled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever warms up waits for every lesson, so none may be left open."""

    def broken(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(engine.reuse.parts.learner, "_pair", broken)
    gained = engine.warm([whole(0), whole(0, template=2)], LOOSE)
    assert [each.num_pairs for each in gained] == [0, 0]
    monkeypatch.setattr(engine.reuse.parts.learner, "_trial", broken)
    gained = engine.warm([whole(1), whole(1, template=2)], LOOSE)
    assert [each.num_pairs for each in gained] == [0, 0]


def test_a_bar_is_shown_where_it_is_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.warm([whole(0)], LOOSE)
    assert capsys.readouterr().err == ""
    engine.warm([whole(1)], LOOSE, progress=True)
    assert "learning from examples" in capsys.readouterr().err


def test_a_reader_without_anchors_is_told_of_no_corrected_rung(engine: Engine) -> None:
    """Bug: nobody's edges looked like those within a row of documents, which need no anchors."""
    add(engine, reader_of(whole(0)), *[pair(turned=0.0, corrected=0.0)] * 20)
    unknown, corrected = whole(0, template=2), ReusePolicy(0.1, 0.9, rungs=CORRECTED)
    status = engine.reuse.status(unknown)
    assert (status.level, status.rung) == (Level.POOL, str(TURNED[-1]))
    assert engine.reuse.status(unknown, policy=corrected).reason is Reason.NO_ANCHORS
