"""Waiting for an engine that may never answer.

A limit that no slow machine reaches, unless the engine's thread has ended with an exception: then whoever waits must
have been told already, and a short while is enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 300.0
GRACE_S = 10.0
SLICE_S = 0.25


class Patience:
    """Knows whether a thread has ended with an exception since `renew`."""

    def __init__(self) -> None:
        self._has_died = threading.Event()

    def renew(self) -> None:
        """Another engine, another thread."""
        self._has_died.clear()

    def wait(self, wait: Callable[[float], bool]) -> bool:
        """`wait(timeout_s)` until it is true; False when there is no more hope."""
        return any(wait(slice_s) for slice_s in self.slices())

    def slices(self) -> Iterator[float]:
        """Short times to wait, as long as there is hope."""
        left_s = PATIENCE_S
        while left_s > 0:
            yield SLICE_S
            left_s = min(left_s - SLICE_S, GRACE_S if self._has_died.is_set() else PATIENCE_S)

    def call(self, function: Callable[[], None]) -> bool:
        """Call something that may block, in a thread of its own; False if it does not come back."""
        thread = threading.Thread(target=function, name="kvcomm-faults-caller", daemon=True)
        thread.start()
        return self.wait(lambda timeout_s: _is_over(thread, timeout_s))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the ends of threads instead of printing them: faults are expected to be seen elsewhere."""
        hook = threading.excepthook
        threading.excepthook = lambda arguments: self._has_died.set()
        try:
            yield
        finally:
            threading.excepthook = hook


def _is_over(thread: threading.Thread, timeout_s: float) -> bool:
    thread.join(timeout_s)
    return not thread.is_alive()
