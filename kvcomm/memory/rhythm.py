"""How a path of the cache is visited, and how long one would wait until somebody asks for it again.

Each path has a rhythm: the mean, on a log scale, of the gaps between its visits, and how often it came back. A
path waits for about its usual gap; once it is overdue the wait that is to be expected grows faster than its age, as
measured traces show (gaps have heavy tails).
"""

from __future__ import annotations

import math
from typing import NamedTuple

FIRST_GAP_S = 40.0
"""The gap that a path is expected to have before it has come back once."""

SAME_VISIT_S = 1.0
"""Uses that follow each other sooner are one visit: a batch of agents, a retry."""

MAX_RETURNS = 3
"""From so many returns on a path counts as one that comes back."""

_MIN_STEP = 0.25
_NEWCOMER = 4.0  # how much longer the wait for a path is that has never come back
_PER_OCTAVE = 2


class Rhythm(NamedTuple):
    """How a path has been visited: the log of its usual gap in seconds, and how often it came back."""

    log_gap: float = math.log(FIRST_GAP_S)
    num_returns: int = 0

    def after(self, gap_s: float) -> Rhythm:
        """The rhythm with one more visit, `gap_s` seconds after the last use."""
        if gap_s < SAME_VISIT_S:
            return self
        num_returns = self.num_returns + 1
        step = max(_MIN_STEP, 1 / (num_returns + 1))
        return Rhythm(self.log_gap + step * (math.log(gap_s) - self.log_gap), num_returns)

    @property
    def kind(self) -> RhythmKind:
        """Those that wait alike, rounded."""
        halves = round(self.log_gap / math.log(2) * _PER_OCTAVE)
        return RhythmKind(halves, min(self.num_returns, MAX_RETURNS))


class RhythmKind(NamedTuple):
    """Rhythms that are treated alike: usual gap in half octaves of a second, and returns up to `MAX_RETURNS`."""

    half_octaves: int
    num_returns: int

    def wait_s(self, age_s: float) -> float:
        """Seconds until the next visit, as far as one may tell, of what was last used `age_s` ago."""
        gap_s = math.exp2(self.half_octaves / _PER_OCTAVE)
        overdue = age_s * math.sqrt(age_s / gap_s) if age_s > 0 else 0.0
        return (1 + _NEWCOMER * math.exp2(-self.num_returns)) * max(gap_s, overdue)
