"""The lock rule, asserted: what the threads of an engine share is touched only by whoever holds the engine's lock.

An owner of shared state is told when it is made how to see who holds the lock, and asserts it first in every public
method. So a caller that forgets the lock fails where it forgets it, and not later in somebody else's request. State
that one thread has for itself, as in tests and simulations, is `unshared`.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

IsHeld = Callable[[], bool]
"""Whether the calling thread may touch the state."""

NOT_HELD = "shared state is touched by a thread that does not hold the engine's lock"
"""Of the AssertionError where it may not."""


def unshared() -> bool:
    """One thread has the state for itself."""
    return True


def holding(lock: RLock) -> IsHeld:
    """Whoever holds `lock` may, and nobody else."""
    is_owned: IsHeld = lock._is_owned  # type: ignore[attr-defined]  # as threading.Condition asks an RLock
    return is_owned
