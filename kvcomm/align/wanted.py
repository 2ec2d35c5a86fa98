"""What is missing until more can be done: pairs for a bound, anchor tokens of a bank. In numbers, for people."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import pairs_needed
from kvcomm.align.estimators import TokenSettings
from kvcomm.align.levels import Count


def pairs_wanted(count: Count, bound: Bound) -> int:
    """Pairs at which something changes next: text may be moved at all, or the level decides whatever others have."""
    least = pairs_needed(bound.delta)
    return least if count.num_pairs < least else count.num_needed


def best_count(counts: Iterable[Count]) -> Count:
    """Of one level: the ladder with most pairs, the first one among equals."""
    return max(counts, key=lambda count: count.num_pairs)


def tokens_wanted(num_tokens: int, *, max_tokens: int | None = None) -> int:
    """Anchor tokens at which something changes next: the bank may be used, or is full.

    Args:
        max_tokens: that a bank may hold; None: nobody knows here.
    """
    settings = TokenSettings()
    full = settings.mature_tokens if max_tokens is None else min(settings.mature_tokens, max_tokens)
    return min(settings.min_tokens, full) if num_tokens < settings.min_tokens else full
