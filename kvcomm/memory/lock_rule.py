"""The lock rule, asserted: what the threads of an engine share is touched only by whoever holds the engine's lock.

An owner of shared state is given a check when it is made, and calls it first in every public method. So a caller that
forgets the lock fails where it forgets it, and not later in somebody else's request. State that one thread has for
itself, as in tests and simulations, is checked by `unshared`, which says yes.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

RequireHeld = Callable[[], None]
"""Raises AssertionError unless the calling thread may touch the state."""


def unshared() -> None:
    """One thread has the state for itself."""


def holding(lock: RLock) -> RequireHeld:
    """Whoever holds `lock` may, and nobody else."""
    is_owned = lock._is_owned  # type: ignore[attr-defined]  # as threading.Condition asks an RLock

    def require_held() -> None:
        assert is_owned(), "shared state is touched by a thread that does not hold the engine's lock"

    return require_held
