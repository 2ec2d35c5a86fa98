"""Requests reused in one given way: every selector against stock forwards and against replays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvcomm.align.ladder import top_tokens
from kvcomm.engine.engine import Engine
from kvcomm.engine.request import Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.lab.selectors import SELECTORS
from kvcomm.lab.variant import SELECTOR_NAMES, Variant
from kvcomm.memory.segments import Segment
from kvcomm.reuse.attempt import Approximation
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import greedy, some_tokens
from tests.tiny import tiny_model

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
ROLES = [tuple(some_tokens(21, seed=seed)) for seed in (1, 2)]
"""Of one length: what is moved between them keeps its place."""
TEXT, TAIL = tuple(some_tokens(60, seed=3)), tuple(some_tokens(5, seed=4))


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        yield engine
        engine.check_integrity()


def ask(engine: Engine, role: int, variant: Variant | None = None) -> Completion:
    prompt = [Segment(ROLES[role]), Segment(TEXT, "question"), Segment(TAIL)]
    return engine.generate(prompt, SAMPLING, variant=variant)


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
    served = ask(engine, 1, Variant("rotate"))
    assert list(served.token_ids) == on_copied_kv(engine)
    assert served.usage.aligned_tokens == len(TEXT)
    assert served.usage.approximation is not None
    assert served.usage.approximation.predicted == float("inf")


@pytest.mark.parametrize("selector", ["attention", "influence", "head", "deviation"])
def test_with_everything_recomputed_answers_are_exact(engine: Engine, selector: str) -> None:
    ask(engine, 0)
    served = ask(engine, 1, Variant("rotate", 1.0, selector))
    assert list(served.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)
    assert served.usage.reasons["rung"] == len(TEXT)


@pytest.mark.parametrize("selector", ["attention", "influence", "head", "deviation"])
def test_a_share_is_recomputed(engine: Engine, selector: str) -> None:
    ask(engine, 0)
    served = ask(engine, 1, Variant("rotate", 0.25, selector)).usage
    assert (served.aligned_tokens, served.reasons["rung"]) == (45, 15)


def test_deviations_take_two_layers_to_know(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as by comparing with an exact forward over everything."""
    chosen: list[np.ndarray] = []
    chooser = engine.reuse.planner._deviation
    keep = chooser.choose

    def choose(request: Request, approximation: Approximation) -> None:
        keep(request, approximation)
        assert approximation.chosen is not None
        chosen.append(approximation.chosen)
        with torch.no_grad():
            first, second = (
                engine.model(torch.tensor([[*role, *TEXT]]), use_cache=True).past_key_values.layers[1] for role in ROLES
            )
        difference = torch.cat((first.keys - second.keys, first.values - second.values), dim=-1)
        scores = difference[0, :, len(ROLES[0]) :].transpose(0, 1).flatten(1).norm(dim=-1)
        chosen.append(top_tokens(approximation.moves, 0.25, scores))

    monkeypatch.setattr(chooser, "choose", choose)
    ask(engine, 0)
    ask(engine, 1, Variant("rotate", 0.25, "deviation"))
    assert chosen[0].tolist() == chosen[1].tolist()


def test_what_it_leaves_behind_is_moved_for_nobody_with_a_bound(engine: Engine) -> None:
    ask(engine, 0)
    ask(engine, 1, Variant("rotate"))
    renditions = engine.memory.segments.renditions_of(engine.namespace(), Segment(TEXT, "question"))
    assert sorted(rendition.risk for rendition in renditions) == [0.0, float("inf")]
    exact = engine.generate(
        [Segment(ROLES[1]), Segment(TEXT, "question"), Segment(TAIL)], SAMPLING, policy=ReusePolicy(5.0)
    )
    assert list(exact.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)


def test_an_estimator_that_knows_nothing_computes(engine: Engine) -> None:
    ask(engine, 0)
    served = ask(engine, 1, Variant("paper"))
    assert served.usage.reasons["no_anchors"] == len(TEXT)
    assert list(served.token_ids) == greedy(engine.model, tokens_of(1), SAMPLING.max_new_tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"estimator": "magic"}, "unknown estimator 'magic'; there are token, paper, rotate"),
        ({"estimator": "token", "selector": "magic"}, "unknown selector 'magic'; there are attention"),
        ({"estimator": "token", "share": 1.5}, "share must be between 0 and 1, got 1.5"),
        ({"estimator": "token", "strength": float("nan")}, "strength must be a finite number, got nan"),
    ],
)
def test_unknown_ways_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Variant(**wrong)


def test_every_selector_has_its_name() -> None:
    assert tuple(SELECTORS) == SELECTOR_NAMES
