"""Beginnings of prompts that text was moved into: one that comes back is computed, and is an exact prefix from then on.

What was moved never enters the tree, so a prompt that is sent again, or grows turn by turn, would pay for moving the
same text every time, and for all that stands behind it. Whoever has rented once buys at the second time, which costs
at most about twice what knowing the future would (the ski-rental rule).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvcomm.memory.memory import Memory

CAPACITY = 65_536
"""Beginnings that are remembered, as a number of 64 bits each; those that were met longest ago are forgotten first."""


class MovedBeginnings:
    """What text was moved behind, as long as nobody resets the memory. Called under the engine's lock.

    Two beginnings with one hash cost a computation, never an answer.
    """

    def __init__(self, memory: Memory, capacity: int = CAPACITY) -> None:
        self._memory = memory
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def remember(self, namespace: str, token_ids: npt.NDArray[np.int32], ends: Iterable[int]) -> None:
        """Text that ends at each of these positions was moved into a prompt."""
        for end in ends:
            key = self._key(namespace, token_ids, end)
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def back_until(self, namespace: str, token_ids: npt.NDArray[np.int32], ends: Iterable[int], *, forget: bool) -> int:
        """How far a prompt begins as one did before; 0: not so far as the first text that could be moved.

        Args:
            ends: where the texts end that could be moved, ascending.
            forget: it will be computed. Should the tree not keep it, text is moved again the next time.
        """
        until = 0
        for end in ends:
            key = self._key(namespace, token_ids, end)
            if key not in self._known:
                break
            until = end
            if forget:
                del self._known[key]
        return until

    def _key(self, namespace: str, token_ids: npt.NDArray[np.int32], end: int) -> int:
        return hash((self._memory.num_resets, namespace, token_ids[:end].tobytes()))
