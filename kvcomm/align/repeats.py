"""Repeats: how much of what stands before a token says again what its source had not read.

Agents quote each other. A token that continues a quotation is computed from what it quotes, so where the source of a
moved text had not read that, its KV is off in a way of its own, and such tokens are good anchors for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 8
"""Tokens of a repeat beyond which length says nothing more."""
NUM_ENTRIES = 2
"""What `repeats` gives per token."""

_BREAK = np.full(1, -1, dtype=np.int32)
"""No token: no repeat goes on across it."""


class Surroundings(NamedTuple):
    """Token ids of a moved segment and of the slots before it; template text does not count.

    Attributes:
        own: the segment's, from its first token on.
        seen: slots before the source.
        unseen: slots before the target that do not stand before the source.
    """

    own: Sequence[int]
    seen: Sequence[Sequence[int]] = ()
    unseen: Sequence[Sequence[int]] = ()


def repeats(around: Surroundings) -> np.ndarray:
    """How much each token of a segment repeats, [num_tokens, 2] float32.

    A repeat is the longest text ending with the token, inside its segment and up to `LONGEST` tokens, that stands
    somewhere else too.

    Returns:
        log(1 + length) of the longest repeat of what the source had not seen, and by how much that is more than
        log(1 + length) of the longest one of what it had: earlier slots and the segment itself; 0 where it is not.
    """
    own = np.asarray(around.own, dtype=np.int32)
    if not around.unseen:
        return np.zeros((len(own), NUM_ENTRIES), dtype=np.float32)
    unseen, seen = _in_a_row(around.unseen), _in_a_row(around.seen)
    from kvcomm.align.ops import cpu

    fresh = cpu.longest_matches(own, unseen, len(unseen), LONGEST)
    known = cpu.longest_matches(own, np.concatenate((seen, own)), len(seen), LONGEST)
    new, old = np.log1p(fresh, dtype=np.float32), np.log1p(known, dtype=np.float32)
    return np.stack((new, np.maximum(new - old, 0)), axis=1)


def _in_a_row(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """All texts, a break after each."""
    parts = [part for text in texts for part in (np.asarray(text, dtype=np.int32), _BREAK)]
    return np.concatenate(parts) if parts else _BREAK
