"""What may go wrong with moved KV: an exact answer or a clear error, never a wrong or lost answer."""

from __future__ import annotations

import pytest
import torch

from kvcomm.align.estimators import TokenEstimator
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.cost import CostModel
from tests.engine.conftest import greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.test_reuse import LOOSE, ROLE_A, ROLE_B, SAMPLING, TAIL, ask, earn, engine, prompt

__all__ = ["engine"]  # the fixture


def tokens_of(segments: list[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


def test_an_empty_segment_is_nothing_to_move(engine: Engine) -> None:
    read = [Segment(ROLE_B), Segment((), "question"), Segment(TAIL)]
    for _ in range(2):
        served = engine.generate(read, SAMPLING, policy=LOOSE)
        assert list(served.token_ids) == greedy(engine.model, tokens_of(read), 8)
    assert engine.wait_idle(PATIENCE_S)
    assert not engine.edge_groups()


def test_a_segment_longer_than_the_window_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="639 prompt tokens"):
        ask(engine, ROLE_B, 1, LOOSE, length=600)
    assert ask(engine, ROLE_B, 1, LOOSE).finish_reason == "length"


def test_learning_that_dies_costs_no_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> int:
        raise MemoryError("no room for anchors")

    monkeypatch.setattr(TokenEstimator, "learn", dies)
    for seed in range(3):
        ask(engine, ROLE_A, seed, LOOSE)
        served = ask(engine, ROLE_B, seed, LOOSE)
        assert list(served.token_ids) == greedy(engine.model, tokens_of(prompt(ROLE_B, seed)), 8)
        assert engine.wait_idle(PATIENCE_S)
    assert engine.reuse.idle.num_failed == 3
    with pytest.raises(MemoryError, match="no room for anchors"):
        engine.learn(prompt(ROLE_B, 2)).result(PATIENCE_S)
    monkeypatch.undo()
    assert engine.learn(prompt(ROLE_B, 2)).result(PATIENCE_S) > 0  # the next one is not harmed


def test_moving_that_fails_computes_exactly(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("kvcomm.reuse.planner.assemble", fails)
    served = ask(engine, ROLE_B, 99, LOOSE)
    assert served.usage.aligned_tokens == 0
    assert list(served.token_ids) == greedy(engine.model, tokens_of(prompt(ROLE_B, 99)), 8)


def test_anchors_that_are_not_finite_are_never_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.reuse.estimators["token"]
    assert isinstance(real, TokenEstimator)
    dim = engine.reuse.anchors.shape.dim
    monkeypatch.setattr(real, "_sketcher", lambda layers, move: torch.full((2, move.num_tokens, dim), torch.nan))
    ask(engine, ROLE_A, 1, LOOSE)
    ask(engine, ROLE_B, 1, LOOSE)
    with pytest.raises(InvalidRequest, match="anchors must be finite"):
        engine.learn(prompt(ROLE_B, 1)).result(PATIENCE_S)


def test_answers_end_when_the_engine_closes_while_learning(engine: Engine) -> None:
    for seed in range(4):
        ask(engine, ROLE_A, seed, LOOSE)
        ask(engine, ROLE_B, seed, LOOSE)
    pending = engine.calibrate(prompt(ROLE_B, 1), some_tokens(5, seed=3), LOOSE)
    engine.close()
    assert pending.done()


def test_a_machine_that_cannot_be_measured_computes_everything(engine: Engine) -> None:
    calls = []

    def fails() -> CostModel:
        calls.append(1)
        raise RuntimeError("no compiler")

    engine.reuse.cost.model, engine.reuse.cost._measure = None, fails
    for seed in range(2):
        ask(engine, ROLE_A, seed, LOOSE)
        served = ask(engine, ROLE_B, seed, LOOSE)
        assert list(served.token_ids) == greedy(engine.model, tokens_of(prompt(ROLE_B, seed)), 8)
    assert calls == [1]
