"""Replays taken apart: they agree with `Engine.measure`, and their errors with caches of stock forwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvcomm.align.ladder import Rung
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.lab.anatomy import dissect
from kvcomm.lab.methods import add_to
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import greedy, some_tokens, stock_logits
from tests.tiny import tiny_model

ROLES = [tuple(some_tokens(21, seed=seed)) for seed in (1, 2)]
"""Of one length: what is moved between them keeps its place."""
TEXT, TAIL = tuple(some_tokens(60, seed=3)), tuple(some_tokens(5, seed=4))
RUNGS = [Rung("rotate"), Rung("rotate", 0.25), Rung("rotate", 0.25, "head"), Rung("rotate", 1.0)]


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        add_to(engine)
        yield engine
        engine.check_integrity()


def prompt(role: int) -> list[Segment]:
    return [Segment(ROLES[role]), Segment(TEXT, "question"), Segment(TAIL)]


@pytest.fixture
def answer(engine: Engine) -> list[int]:
    engine.context(prompt(0), policy=ReusePolicy.exact()).release()
    return greedy(engine.model, [*ROLES[1], *TEXT, *TAIL], 8)


def test_the_mean_over_positions_is_what_measure_gives(engine: Engine, answer: list[int]) -> None:
    measured = engine.reuse.measure(prompt(1), answer, RUNGS).result()
    found = dissect(engine, prompt(1), answer, RUNGS).result().anatomies
    for outcome, anatomy in zip(measured, found, strict=True):
        assert anatomy is not None
        assert len(anatomy.divergences) == len(answer)
        assert anatomy.divergence == pytest.approx(outcome.divergence, rel=1e-4, abs=1e-7)
        assert anatomy.agreement == pytest.approx(outcome.agreement)


def test_exact_log_probabilities_are_the_stock_forwards(engine: Engine, answer: list[int]) -> None:
    exact = dissect(engine, prompt(1), answer, []).result().exact
    logits = stock_logits(engine.model, [*ROLES[1], *TEXT, *TAIL, *answer[:-1]])[-len(answer) :]
    torch.testing.assert_close(exact, logits.log_softmax(-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_errors_are_those_of_the_stock_caches(engine: Engine, answer: list[int]) -> None:
    (anatomy,) = dissect(engine, prompt(1), answer, RUNGS[:1]).result().anatomies
    assert anatomy is not None
    moved, true = (engine.model(torch.tensor([[*role, *TEXT]]), use_cache=True).past_key_values for role in ROLES)
    for layer, (one, other) in enumerate(zip(moved.layers, true.layers, strict=True)):
        assert anatomy.key_errors[layer] == pytest.approx(relative(one.keys, other.keys), rel=1e-3, abs=1e-5)
        assert anatomy.value_errors[layer] == pytest.approx(relative(one.values, other.values), rel=1e-3, abs=1e-5)
    assert anatomy.key_errors[0] == pytest.approx(0, abs=1e-5)
    assert anatomy.key_errors[1] > 0.01


def relative(got: Tensor, true: Tensor) -> float:
    got, true = got[:, :, len(ROLES[0]) :], true[:, :, len(ROLES[0]) :]
    return float((got - true).norm() / true.norm())


def test_with_everything_recomputed_nothing_is_off(engine: Engine, answer: list[int]) -> None:
    (anatomy,) = dissect(engine, prompt(1), answer, [Rung("rotate", 1.0)]).result().anatomies
    assert anatomy is not None
    assert max(*anatomy.divergences, *anatomy.key_errors, *anatomy.value_errors) < 1e-5
    assert all(anatomy.is_same)


def test_without_a_source_there_is_nothing_to_take_apart(engine: Engine) -> None:
    assert dissect(engine, prompt(1), [5, 6], RUNGS).result().anatomies == ()
    with pytest.raises(InvalidRequest, match="an empty answer"):
        dissect(engine, prompt(1), [], RUNGS)
    with pytest.raises(InvalidRequest, match="unknown chooser 'magic'"):
        dissect(engine, prompt(1), [5, 6], [Rung("rotate", 0.5, "magic")])


def test_an_estimator_that_knows_nothing_is_left_out(engine: Engine, answer: list[int]) -> None:
    found = dissect(engine, prompt(1), answer, [Rung("paper"), Rung("rotate")]).result().anatomies
    assert found[0] is None
    assert found[1] is not None
