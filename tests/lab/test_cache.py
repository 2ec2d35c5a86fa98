"""A bare cache, against a dictionary of everything that was ever served."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcomm.lab.cache import ORDERS, BareCache, EventKind

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=20)


@given(PROMPTS)
def test_with_room_everything_is_found_again(prompts: list[list[int]]) -> None:
    cache = BareCache(num_pages=400, page_size=4)
    known: list[list[int]] = []
    for prompt in prompts:
        common = max((_num_alike(prompt, each) for each in known), default=0)
        found = cache.serve("one", prompt)
        assert found.num_found == common
        assert found.seconds >= 0
        assert cache.serve("another", prompt[:0]).num_found == 0
        cache.check_integrity()
        known.append(prompt)


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(PROMPTS)
@example([[0], [0] * 4, [0] * 17])  # the page of the first is in the way, above the one that the last shares
def test_without_room_it_stays_whole(order: str, prompts: list[list[int]]) -> None:
    cache = BareCache(num_pages=5, page_size=4, eviction=order)
    for prompt in prompts:
        cache.serve("one", prompt)
        assert cache.tree.peek("one", prompt) == min(len(prompt), 20)  # a larger one as far as it fits
        assert cache.num_held <= 5
        cache.check_integrity()


def test_time_is_what_it_is_told() -> None:
    cache = BareCache(num_pages=50, page_size=4, ttl_s=10.0)
    prompt = np.arange(8)
    cache.serve("one", prompt)
    cache.serve("one", prompt + 100, ttl_s=60.0)
    cache.now_s = 10.5
    assert cache.serve("one", prompt[:0]).num_found == 0
    assert cache.tree.peek("one", prompt) == 0
    assert cache.tree.peek("one", prompt + 100) == 8
    assert cache.num_held == 2


def test_too_many_events_are_lost() -> None:
    cache = BareCache(num_pages=50, page_size=4, max_events=2)
    cache.tree.take_events()
    for first in range(5):
        cache.serve("one", [first, 9, 9])
    assert EventKind.LOST in [event.kind for event in cache.tree.take_events()]


def _num_alike(one: list[int], other: list[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
