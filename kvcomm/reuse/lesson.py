"""Lessons: requests that are served exactly so that all there is to learn from them is learned at once.

What a request teaches depends on what had been read before it and not after, so a lesson goes along with its request
and is learned from in the state that it leaves.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from kvcomm.align.calibration import Pair
from kvcomm.reuse.policy import ReusePolicy


@dataclass(eq=False)
class Lesson:
    """What is to be learned from one request.

    Attributes:
        policy: says which rungs are measured, and so what is taught.
        learned: the pair that came of it; None where nothing of the prompt can be moved, or it was given up for a
            request that needed its pages.
    """

    policy: ReusePolicy
    learned: Future[Pair | None] = field(default_factory=Future)

    def settle(self, pair: Pair | None) -> None:
        """It has been learned from, or never will be. The first call counts."""
        if not self.learned.done():
            self.learned.set_result(pair)
