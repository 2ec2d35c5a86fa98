"""What may go wrong with moved KV: an exact answer or a clear error, never a wrong or lost answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomm.align.attention_mass import AttentionMass
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.estimators import TokenEstimator
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import ReaderBook
from kvcomm.align.prior import Prior, write_prior
from kvcomm.align.probes import Probes
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import AnchorFileError, AnchorFileForeign, EngineClosed, InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.reuse.attempt import Attempt
from kvcomm.reuse.choosing import AttentionChooser
from kvcomm.reuse.cost import CostModel
from tests.engine.conftest import greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, SAMPLING, TAIL, TOKEN, ask, earn, prompt, tokens_of
from tests.tiny import TinyModel

LOOKING = replace(LOOSE, rungs=(Rung("token", 0.3),))
"""A rung that looks at the prompt's end before it chooses."""

PAIR = Pair({Rung("rotate"): Measured(0.01)})


class Injected(Exception):
    """What a test raises somewhere inside."""


def test_an_empty_segment_is_nothing_to_move(learning: Engine) -> None:
    read = [Segment(ROLE_B), Segment((), "question"), Segment(TAIL)]
    for _ in range(2):
        served = learning.generate(read, SAMPLING, policy=LOOSE)
        assert list(served.token_ids) == greedy(learning.model, tokens_of(read), 8)
    assert learning.wait_idle(PATIENCE_S)
    assert not learning.reuse.readers()


def test_a_segment_longer_than_the_window_is_refused(learning: Engine) -> None:
    with pytest.raises(InvalidRequest, match="639 prompt tokens"):
        ask(learning, ROLE_B, 1, LOOSE, length=600)
    assert ask(learning, ROLE_B, 1, LOOSE).finish_reason == "length"


@pytest.mark.parametrize(
    "ask_with",
    [
        lambda engine, rung: engine.submit(prompt(ROLE_B, 1), SAMPLING, policy=replace(LOOSE, rungs=(rung,))),
        lambda engine, rung: engine.submit(prompt(ROLE_B, 1), SAMPLING, rung=rung),
        lambda engine, rung: engine.explain(prompt(ROLE_B, 1), policy=replace(LOOSE, rungs=(rung,))),
        lambda engine, rung: engine.reuse.measure(prompt(ROLE_B, 1), [5], [rung]),
        lambda engine, rung: engine.reuse.calibrate(prompt(ROLE_B, 1), [5], replace(LOOSE, rungs=(rung,))),
    ],
)
@pytest.mark.parametrize(
    ("rung", "message"),
    [(Rung("magic"), "unknown estimator 'magic'"), (Rung("token", 0.5, "magic"), "unknown chooser 'magic'")],
)
def test_rungs_that_this_engine_does_not_have_are_refused_before_anything_is_computed(
    learning: Engine, ask_with: Callable[[Engine, Rung], object], rung: Rung, message: str
) -> None:
    """Bug: the request, or the job, failed with a KeyError of the engine's own, and kept its sources' pages."""
    ask(learning, ROLE_A, 1, LOOSE)
    with pytest.raises(InvalidRequest, match=message):
        ask_with(learning, rung)
    with pytest.raises(InvalidRequest, match="unknown estimator 'magic'"):
        learning.reuse.learn(prompt(ROLE_B, 1), estimators=["magic"])


def test_learning_that_dies_costs_no_request(
    learning: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dies(*_: object) -> int:
        raise MemoryError("no room for anchors")

    monkeypatch.setattr(TokenEstimator, "learn", dies)
    for seed in range(3):
        ask(learning, ROLE_A, seed, TOKEN)
        served = ask(learning, ROLE_B, seed, TOKEN)
        assert list(served.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, seed)), 8)
        assert learning.wait_idle(PATIENCE_S)
    assert [record.message for record in caplog.records] == ["idle work failed"] * 3
    with pytest.raises(MemoryError, match="no room for anchors"):
        learning.reuse.learn(prompt(ROLE_B, 2)).result(PATIENCE_S)
    monkeypatch.undo()
    assert learning.reuse.learn(prompt(ROLE_B, 2)).result(PATIENCE_S) > 0  # the next one is not harmed


MOVING = {
    "turning and correcting": ("kvcomm.reuse.attempt.assemble", "failed"),
    "the first step": (f"{Attempt.__module__}.Attempt.begin", "failed"),
    "taking up looking on": (f"{Attempt.__module__}.Attempt.watch", "failed"),
    "looking on": (f"{AttentionMass.__module__}.AttentionMass._add", "failed"),
    "scoring": (f"{AttentionMass.__module__}.AttentionMass.by_head", "failed"),
    "choosing": (f"{AttentionChooser.__module__}.AttentionChooser.choose", "failed"),
    "the check": (f"{Probes.__module__}.Probes.residual", "failed"),
}


@pytest.mark.parametrize("place", MOVING)
def test_moving_that_fails_is_told_and_the_answer_is_exact(
    learning: Engine, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Told as such, in the usage and in the log; whoever is served in the same steps does not notice."""
    earn(learning, LOOKING)
    ask(learning, ROLE_A, 99, LOOKING)
    neighbor = some_tokens(40, seed=7)

    def fails(*_: object, **__: object) -> None:
        raise Injected("out of memory")

    name, reason = MOVING[place]
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(name, fails)
        with learning.lock:
            other = learning.submit(neighbor, SamplingParams(max_new_tokens=8, ignore_eos=True))
            handle = learning.submit(prompt(ROLE_B, 99), SAMPLING, policy=LOOKING)
        served = handle.result(PATIENCE_S)
    assert list(other.result(PATIENCE_S).token_ids) == greedy(learning.model, neighbor, 8)
    assert served.usage.aligned_tokens == 0
    assert served.usage.approximation is None
    assert served.usage.reasons == {reason: 90 + len(TAIL)}
    assert list(served.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), 8)
    assert any("Injected" in str(record.exc_info) for record in caplog.records)
    learning.check_integrity()
    ask(learning, ROLE_A, 98, LOOKING)
    assert ask(learning, ROLE_B, 98, LOOKING).usage.aligned_tokens == 63  # the next one is not harmed


def test_a_decision_that_fails_gives_its_sources_back(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: pages of what had been found stayed retained for good."""
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)

    def fails(*_: Any, **__: Any) -> None:
        raise Injected("no decision")

    with monkeypatch.context() as patch:
        patch.setattr(ReaderBook, "grounds", fails)
        handle = learning.submit(prompt(ROLE_B, 99), SAMPLING, policy=LOOSE)
        with pytest.raises(Injected):
            handle.result(PATIENCE_S)
    learning.check_integrity()
    assert ask(learning, ROLE_B, 99, LOOSE).usage.aligned_tokens == 90


def test_logits_of_moved_kv_that_are_no_numbers_end_that_request_alone(
    learning: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    keep = Attempt.assemble

    def spoils(self: Attempt, sequence: Any) -> None:
        keep(self, sequence)
        pool, position = learning.pool, self.moves[0].start
        slot = int(sequence.pages[position // pool.page_size]) * pool.page_size + position % pool.page_size
        pool.values[0][slot] = torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "assemble", spoils)
        handle = learning.submit(prompt(ROLE_B, 99), SAMPLING, policy=LOOSE)
        with pytest.raises(Exception, match="NaN or infinite"):
            handle.result(PATIENCE_S)
    exact = ask(learning, ROLE_B, 99, replace(LOOSE, max_divergence=0.0))
    assert list(exact.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), 8)


def test_anchors_that_are_not_finite_are_never_kept(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = learning.reuse.parts.estimators["token"]
    assert isinstance(real, TokenEstimator)
    dim, groups = learning.reuse.parts.anchors.shape.dim, learning.reuse.parts.anchors.shape.num_groups

    def broken(layers: object, move: Any) -> Tensor:
        return torch.full((groups, move.num_tokens, dim), torch.nan)

    monkeypatch.setattr(real, "_sketcher", broken)
    ask(learning, ROLE_A, 1, LOOSE)
    ask(learning, ROLE_B, 1, LOOSE)
    with pytest.raises(InvalidRequest, match="anchors must be finite"):
        learning.reuse.learn(prompt(ROLE_B, 1)).result(PATIENCE_S)
    assert not sum(bank.snapshot().num_tokens for bank in learning.reuse.parts.anchors.banks(learning.namespace()))


def test_answers_end_when_the_engine_closes_while_learning(learning: Engine) -> None:
    for seed in range(4):
        ask(learning, ROLE_A, seed, LOOSE)
        ask(learning, ROLE_B, seed, LOOSE)
    pending = learning.reuse.calibrate(prompt(ROLE_B, 1), some_tokens(5, seed=3), LOOSE)
    learning.close()
    assert pending.done()


def test_closing_from_a_callback_of_idle_work_ends_everything(learning: Engine) -> None:
    """Bug: the job in whose pass that happened could not be dropped, and those behind it never heard of the end."""
    with learning.lock:
        first = learning.reuse.measure(prompt(ROLE_B, 1), [5, 6], [Rung("rotate")])
        second = learning.reuse.measure(prompt(ROLE_B, 2), [5, 6], [Rung("rotate")])
        first.add_done_callback(lambda _: learning.close())
    assert first.result(PATIENCE_S) == []
    with pytest.raises(EngineClosed):
        second.result(PATIENCE_S)


def test_a_machine_that_cannot_be_measured_computes_everything(learning: Engine) -> None:
    calls = []

    def fails() -> CostModel:
        calls.append(1)
        raise RuntimeError("no compiler")

    earn(learning, LOOSE)
    learning.reuse.parts.cost.model, learning.reuse.parts.cost._measure = None, fails
    for seed in range(100, 102):
        ask(learning, ROLE_A, seed, LOOSE)
        served = ask(learning, ROLE_B, seed, LOOSE)
        assert served.usage.reasons["cost"] == 90
        assert list(served.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, seed)), 8)
    assert calls == [1]


@pytest.mark.parametrize("prior", [3, {}])
def test_a_prior_that_is_none(shared_model: TinyModel, prior: object) -> None:
    with pytest.raises(InvalidRequest, match=r"prior must be a Prior, a file as `python -m eval\.prior` writes it"):
        Engine(shared_model.model, shared_model.tokenizer, prior=prior)  # type: ignore[arg-type]  # that is tested


def test_a_prior_may_be_named_by_its_file(shared_model: TinyModel, tmp_path: Path) -> None:
    model, tokenizer = shared_model.model, shared_model.tokenizer
    with Engine(model, tokenizer, prior=None) as without:
        own, foreign = (Prior(name, {"a": (PAIR,)}, None) for name in (without.prior_model, "other"))
    file = tmp_path / "prior.json"
    write_prior(own, file, name="tiny")
    for prior in (str(file), file):
        with Engine(model, tokenizer, prior=prior) as engine:
            assert tuple(engine.reuse.parts.book.prior) == (PAIR,)
    write_prior(foreign, file, name="other")
    with pytest.raises(AnchorFileForeign, match="measured on another model"):
        Engine(model, tokenizer, prior=file)
    for missing in ("", str(tmp_path / "none.json")):
        with pytest.raises(AnchorFileError, match="cannot be read"):
            Engine(model, tokenizer, prior=missing)


@pytest.mark.parametrize(("prior", "error"), [("/no/prior.json", AnchorFileError), (3, InvalidRequest)])
def test_a_wrong_prior_is_found_before_the_model_is_loaded(prior: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prior"):
        Engine.load("/no/model", prior=prior)


@pytest.mark.parametrize("rung", ["token", 0.3, None])
def test_a_rung_that_is_none(engine: Engine, rung: object) -> None:
    prompt = [Segment((1, 2, 3), "text"), Segment((4, 5))]
    with pytest.raises(InvalidRequest, match="a rung must be a Rung"):
        engine.reuse.measure(prompt, [1], [rung])  # type: ignore[list-item]  # that is tested
    if rung is not None:
        with pytest.raises(InvalidRequest, match="a rung must be a Rung"):
            engine.generate(prompt, rung=rung)  # type: ignore[arg-type]
