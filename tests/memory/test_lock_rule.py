"""The lock rule: whoever holds the lock passes, and no public method of an owner forgets to ask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import Any

import pytest

from kvcomm.memory.lock_rule import NOT_HELD, holding
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.renditions import RenditionStore
from kvcomm.memory.segments import Segment
from kvcomm.memory.tree import RadixTree


def test_who_holds_the_lock_passes_as_often_as_he_likes_and_nobody_else_does() -> None:
    lock = RLock()
    is_held = holding(lock)
    assert not is_held()
    with lock, lock, ThreadPoolExecutor(1) as other:
        assert is_held()
        assert not other.submit(is_held).result()
    assert not is_held()


def public_methods(owner: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", public_methods(RadixTree))
def test_every_method_of_the_tree_asks(name: str) -> None:
    assert_asks(getattr(guarded().tree, name))


@pytest.mark.parametrize("name", public_methods(RenditionStore))
def test_every_method_of_the_store_of_renditions_asks(name: str) -> None:
    assert_asks(getattr(guarded().renditions, name))


def guarded() -> Memory:
    return Memory(PagePool([], num_pages=4, page_size=4), ttl_s=None, rendition_bytes=100, is_held=holding(RLock()))


def assert_asks(method: Callable[..., Any]) -> None:
    """Before it looks at what it is given."""
    given: dict[str, Any] = {"namespace": "n", "tokens": [1], "segment": Segment((1,)), "num_pages": 1}
    required = [each.name for each in inspect.signature(method).parameters.values() if each.default is each.empty]

    def ask() -> None:
        found = method(**{name: given.get(name) for name in required})
        if isinstance(found, Iterator):
            next(found, None)

    with pytest.raises(AssertionError, match=NOT_HELD):
        ask()
