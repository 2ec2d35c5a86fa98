"""What happened lately: sums over short steps of time, for rates of the last minute and curves of the last minutes.

Bounded: as many steps as a curve shows, each with one sum for each thing that is counted. What is counted belongs to
whoever owns the history. Used from the event loop's thread only.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

STEP_S = 10.0
NUM_STEPS = 60
"""Ten minutes."""
MINUTE_STEPS = 6


class History:
    """Sums over the last `NUM_STEPS` steps of `STEP_S` seconds each; the newest step is the one that goes on now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds, monotonic; the first step begins now."""
        self._clock = clock
        self._began_s = clock()
        self._newest = 0  # steps since the beginning
        self._steps: deque[Counter[str]] = deque([Counter()], maxlen=NUM_STEPS)

    def add(self, sums: Mapping[str, int]) -> None:
        """Count things, by name, as of now."""
        self._go_on()
        self._steps[-1].update(sums)

    def curve(self, name: str) -> list[int]:
        """Sums of one thing over every step, oldest first; steps before the beginning have 0."""
        self._go_on()
        known = [step[name] for step in self._steps]
        return [0] * (NUM_STEPS - len(known)) + known

    def last_minute(self, name: str) -> int:
        """Sum over `minute_s`."""
        return sum(self.curve(name)[-MINUTE_STEPS:])

    @property
    def minute_s(self) -> float:
        """Seconds that the last minute has: whole steps and the one that goes on now, or all since the beginning."""
        elapsed_s = self._clock() - self._began_s
        return min(elapsed_s, (MINUTE_STEPS - 1) * STEP_S + elapsed_s % STEP_S)

    def _go_on(self) -> None:
        """Begin the steps that have come since the last look; no more of them than are kept."""
        now = int((self._clock() - self._began_s) // STEP_S)
        for _ in range(min(now - self._newest, NUM_STEPS)):
            self._steps.append(Counter())
        self._newest = max(now, self._newest)
