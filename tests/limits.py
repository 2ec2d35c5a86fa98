"""How long tests wait: for a condition, never for a time, and with a limit that only a hang reaches.

A machine that many others share may be fifty times slower than it is alone; no test may fail because of that.
Whatever a test starts ends with it, also when one of its assertions fails.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_S = 3600.0
"""Seconds. For whatever is waited for: nothing that works takes so long, on any machine."""


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


@contextmanager
def process(command: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[Any]]:
    """A child process for a `with` statement, which it does not outlive; `settings` are those of `Popen`."""
    with subprocess.Popen(command, **settings) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()


@contextmanager
def threads(*works: Callable[[], object]) -> Iterator[list[threading.Thread]]:
    """Threads that work during a `with` statement and are waited for at its end, even if it fails."""
    started = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in started:
        thread.start()
    try:
        yield started
    finally:
        for thread in started:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread did not end"


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """What so many threads got that began together, in the order of their numbers."""
    barrier = threading.Barrier(count)

    def begin(index: int) -> T:
        barrier.wait(PATIENCE_S)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))
