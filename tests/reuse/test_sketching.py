"""Sketches of published texts are made beside requests: whoever moves a text finds them, and they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomm.align.ladder import Rung
from kvcomm.align.sketch import Sketcher
from kvcomm.engine.engine import Engine
from kvcomm.reuse.policy import ReusePolicy
from tests.limits import PATIENCE_S
from tests.reuse.reading import ROLE_A, ROLE_B, SAMPLING, prompt

EXACT = ReusePolicy.exact()


class Watched:
    """Every sketch that is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Tensor] = []
        make = Sketcher._make

        def watched(sketcher: Sketcher, *given: Any) -> Tensor:
            self.made.append(make(sketcher, *given))
            return self.made[-1]

        monkeypatch.setattr(Sketcher, "_make", watched)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def publish(engine: Engine, seed: int, role: tuple[int, ...] = ROLE_A) -> None:
    engine.context(prompt(role, seed), policy=EXACT).release()


def teach(engine: Engine) -> None:
    """Let there be anchors between the two roles."""
    for seed in range(3):
        publish(engine, seed)
        engine.reuse.learn(prompt(ROLE_B, seed)).result(PATIENCE_S)
    assert engine.wait_idle(PATIENCE_S)
    engine.cache.clear()


def test_whoever_moves_a_text_finds_its_sketches(learning: Engine, watched: Watched) -> None:
    teach(learning)
    watched.made.clear()
    publish(learning, 7)
    assert learning.wait_idle(PATIENCE_S)
    (ahead,) = watched.made
    learning.reuse.parts.planner.finder.published = None
    served = learning.generate(prompt(ROLE_B, 7), SAMPLING, policy=EXACT, rung=Rung("token"))
    assert served.usage.aligned_tokens == 90
    assert len(watched.made) == 1

    learning.cache.clear()
    publish(learning, 7)
    again = learning.generate(prompt(ROLE_B, 7), SAMPLING, policy=EXACT, rung=Rung("token"))
    assert again.token_ids == served.token_ids
    torch.testing.assert_close(watched.made[1], ahead)


def test_where_nothing_was_taught_nothing_is_sketched(learning: Engine, watched: Watched) -> None:
    publish(learning, 7)
    assert learning.wait_idle(PATIENCE_S)
    assert not watched.made


def test_text_that_has_gone_is_passed_over(learning: Engine, watched: Watched) -> None:
    teach(learning)
    watched.made.clear()
    publish(learning, 7)
    assert learning.wait_idle(PATIENCE_S)
    num_made = len(watched.made)
    ahead = learning.reuse.parts.planner.finder.published
    assert ahead is not None
    with learning.lock:
        (segment,) = (each for each in prompt(ROLE_A, 7) if each.name is not None)
        (gone,) = learning.memory.renditions.renditions_of(learning.namespace(), segment)
        learning.cache.clear()
        ahead(learning.namespace(), segment, gone)
    assert learning.wait_idle(PATIENCE_S)
    assert len(watched.made) == num_made == 1
