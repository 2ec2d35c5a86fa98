"""Methods of others, handed to an engine: served as stock forwards say, every chooser against another derivation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvcomm.align.edges import Edge
from kvcomm.align.ladder import Rung
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import Place
from kvcomm.align.repeats import Surroundings
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.lab.methods import METHODS, DeviationChooser, HeadChooser, InfluenceChooser, add_to
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.choosing import View
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.stored import renditions_by
from tests.tiny import TinyModel, tiny_model

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
ROLES = [tuple(some_tokens(21, seed=seed)) for seed in (1, 2)]
"""Of one length: what is moved between them keeps its place."""
TEXT, TAIL = tuple(some_tokens(60, seed=3)), tuple(some_tokens(5, seed=4))
CHOOSERS = ("attention", "influence", "head", "deviation")


@pytest.fixture
def engine(shared_model: TinyModel) -> Iterator[Engine]:
    with Engine(shared_model.model, shared_model.tokenizer) as engine:
        add_to(engine)
        yield engine
        engine.check_integrity()


def prompt(role: int) -> list[Segment]:
    return [Segment(ROLES[role]), Segment(TEXT, "question"), Segment(TAIL)]


def ask(engine: Engine, role: int, rung: Rung | None = None) -> Completion:
    return engine.generate(prompt(role), SAMPLING, rung=rung)


def tokens_of(role: int) -> list[int]:
    return [*ROLES[role], *TEXT, *TAIL]


@torch.no_grad()
def on_copied_kv(engine: Engine) -> list[int]:
    """Greedy answer of the second role on the text's KV as the first role left it, by transformers alone."""
    caches = [engine.model(torch.tensor([[*role, *TEXT]]), use_cache=True).past_key_values for role in ROLES]
    mixed = DynamicCache(config=engine.model.config)
    for layer, (first, second) in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        parts = [(second.keys, second.values), (first.keys, first.values)]
        keys, values = (
            torch.cat([parts[0][kind][:, :, : len(ROLES[0])], parts[1][kind][:, :, len(ROLES[0]) :]], dim=2)
            for kind in (0, 1)
        )
        mixed.update(keys, values, layer)
    fed, answer = list(TAIL), []
    for _ in range(SAMPLING.max_new_tokens):
        logits = engine.model(torch.tensor([fed]), past_key_values=mixed, use_cache=True).logits
        answer.append(int(logits[0, -1].argmax()))
        fed = answer[-1:]
    return answer


def test_moved_only(engine: Engine) -> None:
    ask(engine, 0)
    served = ask(engine, 1, METHODS["rotate"])
    assert list(served.token_ids) == on_copied_kv(engine)
    assert served.usage.aligned_tokens == len(TEXT)
    assert served.usage.approximation is not None
    assert served.usage.approximation.predicted == float("inf")


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_with_everything_recomputed_answers_are_exact(engine: Engine, chooser: str) -> None:
    ask(engine, 0)
    served = ask(engine, 1, Rung("rotate", 1.0, chooser))
    assert list(served.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)
    assert served.usage.reasons["rung"] == len(TEXT)


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_a_share_is_recomputed_and_a_replay_says_the_same_of_it(engine: Engine, chooser: str) -> None:
    ask(engine, 0)
    served = ask(engine, 1, Rung("rotate", 0.25, chooser))
    assert (served.usage.aligned_tokens, served.usage.reasons["rung"]) == (45, 15)
    answer = greedy(engine.model, tokens_of(1), 8)
    (outcome,) = engine.reuse.measure(prompt(1), answer, [Rung("rotate", 0.25, chooser)]).result(PATIENCE_S)
    assert outcome.num_recomputed == 15
    assert served.usage.approximation is not None
    assert served.usage.approximation.residual == pytest.approx(outcome.residual, rel=1e-3)


def test_deviations_take_two_layers_to_know(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as by comparing stock caches of an exact forward over everything."""
    chosen: list[IntArray] = []
    keep = DeviationChooser.choose

    def choose(self: DeviationChooser, view: View, share: float) -> IntArray:
        found = keep(self, view, share)
        chosen.append(found)
        return found

    monkeypatch.setattr(DeviationChooser, "choose", choose)
    ask(engine, 0)
    ask(engine, 1, METHODS["cacheblend"])
    engine.reuse.measure(prompt(1), greedy(engine.model, tokens_of(1), 3), [METHODS["cacheblend"]]).result(PATIENCE_S)
    with torch.no_grad():
        first, second = (
            engine.model(torch.tensor([[*role, *TEXT]]), use_cache=True).past_key_values.layers[1] for role in ROLES
        )
    difference = torch.cat((first.keys - second.keys, first.values - second.values), dim=-1)
    scores = difference[0, :, len(ROLES[0]) :].transpose(0, 1).flatten(1).norm(dim=-1)
    best = sorted(range(len(TEXT)), key=lambda token: -float(scores[token]))[: int(0.15 * len(TEXT))]
    assert [each.tolist() for each in chosen] == [sorted(len(ROLES[0]) + token for token in best)] * 2


def moves_of(lengths: list[int]) -> list[Move]:
    """Moves of these lengths, three positions apart."""
    found, start = [], 2
    for length in lengths:
        nothing = np.empty(0, dtype=np.int32)
        edge = Edge("a", "b", "x", "x")
        found.append(Move(edge, start, start + length, 0, Place(slice(0, 0), 0), nothing, Surroundings(())))
        start += length + 3
    return found


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(lengths, st.floats(0, 1))
def test_heads_are_the_first_tokens_of_each_text(sizes: list[int], share: float) -> None:
    moves = moves_of(sizes)
    view = View(moves, 0, KVSequence(PagePool([], num_pages=1)))
    expected = [
        move.start + offset
        for move in moves
        for offset in range(move.num_tokens)
        if offset + 1 <= share * move.num_tokens
    ]
    assert HeadChooser().choose(view, share).tolist() == expected


@given(lengths, st.floats(0, 1), st.integers(0, 2**31))
def test_influence_takes_whole_texts_and_then_the_end_of_the_next(sizes: list[int], share: float, seed: int) -> None:
    moves, draw = moves_of(sizes), np.random.default_rng(seed)
    scores = draw.random(sum(sizes)).astype(np.float32)
    view = View(moves, 0, KVSequence(PagePool([], num_pages=1)), torch.from_numpy(scores))
    found = set(InfluenceChooser().choose(view, share).tolist())
    room = int(share * sum(sizes))
    assert len(found) == room
    parts = np.split(scores, np.cumsum(sizes)[:-1])
    order = sorted(range(len(sizes)), key=lambda index: (-float(torch.from_numpy(parts[index]).mean()), index))
    for index in order:
        move = moves[index]
        taken = min(room, move.num_tokens)
        assert found & set(range(move.start, move.end)) == set(range(move.end - taken, move.end))
        room -= taken


def test_what_it_leaves_behind_is_moved_for_nobody_with_a_bound(engine: Engine) -> None:
    ask(engine, 0)
    ask(engine, 1, METHODS["rotate"])
    renditions = renditions_by(engine, Segment(TEXT, "question"))
    assert sorted(rendition.risk for rendition in renditions) == [0.0, float("inf")]
    exact = engine.generate(prompt(1), SAMPLING, policy=ReusePolicy(5.0))
    assert list(exact.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)


def test_an_estimator_that_knows_nothing_computes(engine: Engine) -> None:
    ask(engine, 0)
    served = ask(engine, 1, METHODS["paper"])
    assert served.usage.reasons["no_anchors"] == len(TEXT)
    assert list(served.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)


def test_the_published_estimator_is_taught_and_then_serves(engine: Engine) -> None:
    """What it has seen itself it knows: the text's own offsets are added, and the answer is exact but for rounding."""
    ask(engine, 0)
    assert engine.reuse.learn(prompt(1), estimators=["paper"]).result(PATIENCE_S) == len(TEXT)
    answer = greedy(engine.model, tokens_of(1), 8)
    paper, turned = engine.reuse.measure(prompt(1), answer, [METHODS["paper"], METHODS["rotate"]]).result(PATIENCE_S)
    assert paper.divergence < 1e-6 < turned.divergence
    assert list(ask(engine, 1, METHODS["paper"]).token_ids) == answer


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_of_its_own_knows_none_of_them(method: str) -> None:
    tiny = tiny_model()
    rung = METHODS[method]
    with Engine(tiny.model, tiny.tokenizer) as engine:
        if method == "rotate":
            assert ask(engine, 0, rung).usage.aligned_tokens == 0
        else:
            with pytest.raises(InvalidRequest, match=r"unknown (estimator 'paper'|chooser '(deviation|head)')"):
                ask(engine, 0, rung)
