"""What was moved before is computed when it comes back, once, and is exact from then on."""

from __future__ import annotations

import numpy as np
import pytest

from kvcomm.align.ladder import Rung
from kvcomm.engine.engine import Engine
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.reuse.beginnings import MovedBeginnings
from tests.reuse.reading import ROLE_A, ROLE_B, SAMPLING, TAIL, ask, prompt
from tests.reuse.test_planner import EXACT, POLICY, know

TOKENS = np.arange(100, dtype=np.int32)


@pytest.fixture
def memory() -> Memory:
    return Memory(PagePool([], num_pages=1), ttl_s=None, rendition_bytes=1)


@pytest.fixture
def beginnings(memory: Memory) -> MovedBeginnings:
    return MovedBeginnings(memory, capacity=3)


def test_a_prompt_comes_back_as_far_as_all_before_it_does(beginnings: MovedBeginnings) -> None:
    beginnings.remember("n", TOKENS, [20, 40, 80])
    changed = TOKENS.copy()
    changed[30] = 999
    for namespace, tokens, until in (("n", TOKENS, 80), ("n", changed, 20), ("n", changed + 1, 0), ("m", TOKENS, 0)):
        assert beginnings.back_until(namespace, tokens, [20, 40, 80], forget=False) == until
    # What is between has not come back: nothing behind it can be an exact prefix.
    assert beginnings.back_until("n", TOKENS, [20, 30, 80], forget=False) == 20


def test_what_is_computed_is_forgotten_and_so_is_what_was_met_longest_ago(beginnings: MovedBeginnings) -> None:
    beginnings.remember("n", TOKENS, [10, 20, 30])
    beginnings.remember("n", TOKENS, [10, 40])
    assert beginnings.back_until("n", TOKENS, [20], forget=False) == 0
    assert beginnings.back_until("n", TOKENS, [10, 30, 40], forget=True) == 40
    assert beginnings.back_until("n", TOKENS, [10, 30, 40], forget=True) == 0


def test_a_reset_memory_knows_nothing_of_before(memory: Memory, beginnings: MovedBeginnings) -> None:
    beginnings.remember("n", TOKENS, [10])
    memory.reset("n")
    assert beginnings.back_until("n", TOKENS, [10], forget=False) == 0


def test_a_prompt_that_comes_back_is_computed_and_then_exact(learning: Engine) -> None:
    """Bug: whoever sent a prompt again, or went on with it, paid for moving the same text every time."""
    know(learning, prior=30)
    ask(learning, ROLE_A, 1, EXACT)
    first = ask(learning, ROLE_B, 1, POLICY).usage
    assert (first.exact_tokens, first.aligned_tokens) == (0, 90)
    grown = [*prompt(ROLE_B, 1), Segment(TAIL)]
    expected = learning.explain(grown, policy=POLICY).plan
    second = learning.generate(grown, SAMPLING, policy=POLICY).usage
    assert second.spans == expected.spans  # whoever asks what would happen changes nothing
    assert (second.aligned_tokens, second.reasons["comes_back"]) == (0, 90)
    third = learning.generate([*grown, Segment(TAIL)], SAMPLING, policy=POLICY).usage
    assert third.exact_tokens >= len(ROLE_B) + 90
    assert third.aligned_tokens == 0


def test_text_behind_what_comes_back_is_moved(learning: Engine) -> None:
    """The first question comes back behind the same role, another one stands behind it."""
    know(learning, prior=30)
    learning.generate([*prompt(ROLE_A, 1)[:2], *prompt((), 2)[1:]], SAMPLING)
    ask(learning, ROLE_B, 1, POLICY)
    two = [*prompt(ROLE_B, 1)[:2], *prompt((), 2)[1:]]
    usage = learning.generate(two, SAMPLING, policy=POLICY).usage
    assert (usage.reasons["comes_back"], usage.aligned_tokens) == (90, 90)


def test_a_rung_that_is_asked_for_is_served_every_time(learning: Engine) -> None:
    know(learning, prior=30)
    ask(learning, ROLE_A, 1, EXACT)
    for _ in range(3):
        usage = learning.generate(prompt(ROLE_B, 1), SAMPLING, rung=Rung("rotate")).usage
        assert usage.aligned_tokens == 90
    assert ask(learning, ROLE_B, 1, POLICY).usage.aligned_tokens == 90
