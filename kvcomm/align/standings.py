"""What is known of one reader: its pairs, the watches over its requests, its latest audits; and levels by name.

Guarded by its owner's lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Pair, SourcesRead
from kvcomm.align.ladder import Ladder
from kvcomm.align.readers import Reader
from kvcomm.align.watch import Watch

MAX_OWN_PAIRS = 200
MAX_AUDITS = 200
MAX_WATCHES = 48
"""Of a reader, and of a tenant."""
MAX_LADDERS = 16
"""Along which pairs are kept in order for the next request."""
YOUNG_AUDITS = 8
"""A reader's first approximate requests that are all audited."""


class Level(StrEnum):
    """Where pairs come from."""

    OWN = "own"
    POOL = "pool"
    PRIOR = "prior"


LEVELS = (Level.OWN, Level.POOL, Level.PRIOR)
"""From the most specific to the least."""


class Audit(NamedTuple):
    """One approximate request held against exact computation.

    Attributes:
        at_s: when, on the monotonic clock.
        divergence: nats, measured.
        predicted: nats; what calibration expected at most.
        bound: that the caller asked for.
        level: that decided.
    """

    at_s: float
    divergence: float
    predicted: float
    bound: Bound
    level: Level

    @property
    def is_violation(self) -> bool:
        """Whether it broke the bound; a divergence that is no number does."""
        return not self.divergence <= self.bound.max_divergence


class Pairs:
    """The newest pairs of one level, and what they say along the ladders that were asked for.

    Guarded by its owner's lock.
    """

    def __init__(self, max_pairs: int | None = None) -> None:
        """Make one.

        Args:
            max_pairs: beyond which the oldest go; None: all are kept.
        """
        self._pairs: deque[tuple[str, Pair]] = deque(maxlen=max_pairs)
        self._seen: dict[tuple[Ladder, frozenset[SourcesRead] | None], Calibration] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        """The oldest first."""
        return (pair for _, pair in self._pairs)

    def add(self, pair: Pair, reader: str = "") -> None:
        """Add one; where there is no more room, the oldest goes.

        Args:
            reader: digest of the reader that it is of.
        """
        self._pairs.append((reader, pair))
        self._seen.clear()

    def clear(self) -> None:
        """Forget them all."""
        self._pairs.clear()
        self._seen.clear()

    def drop(self, reader: str) -> None:
        """Forget those of a reader."""
        self._pairs = deque((each for each in self._pairs if each[0] != reader), self._pairs.maxlen)
        self._seen.clear()

    def along(self, ladder: Ladder, kinds: frozenset[SourcesRead] | None = None) -> Calibration:
        """These pairs, seen along a ladder.

        Args:
            kinds: only those with sources of these kinds; None: all.
        """
        key = ladder, kinds
        if key not in self._seen:
            if len(self._seen) >= MAX_LADDERS:
                self._seen.clear()
            chosen = [pair for pair in self if kinds is None or pair.sources.read in kinds]
            self._seen[key] = Calibration(ladder, chosen)
        return self._seen[key]


class Watches:
    """Watches by level and bound; those used last are kept, so that ever new bounds fill no memory.

    Guarded by its owner's lock.
    """

    def __init__(self) -> None:
        self._watches: OrderedDict[tuple[Level, Bound], Watch] = OrderedDict()

    def __len__(self) -> int:
        return len(self._watches)

    def __iter__(self) -> Iterator[tuple[Level, Watch]]:
        """The one used last at the end."""
        return iter([(level, watch) for (level, _), watch in self._watches.items()])

    def get(self, level: Level, bound: Bound) -> Watch:
        """The watch over a bound at a level; it is there from now on."""
        found = self._watches.pop((level, bound), None) or Watch(bound)
        self._watches[level, bound] = found
        if len(self._watches) > MAX_WATCHES:
            self._watches.popitem(last=False)
        return found

    def put(self, level: Level, watch: Watch) -> None:
        """Take in a copy of a watch, in place of the one over the same bound."""
        self._watches[level, watch.bound] = watch.alone()

    def drop(self, level: Level) -> None:
        """Forget those over a level, whatever the bound."""
        for key in [key for key in self._watches if key[0] is level]:
            del self._watches[key]


@dataclass(eq=False)
class Standing:
    """What is known of one reader.

    Attributes:
        pairs: its own.
        watches: over its requests, by the level that decided about them.
        audits: the latest.
        num_requests, num_approximated, num_audited: since it was first seen.
        num_watched: approximate requests up to which all are audited.
    """

    reader: Reader
    pairs: Pairs = field(default_factory=lambda: Pairs(MAX_OWN_PAIRS))
    watches: Watches = field(default_factory=Watches)
    audits: deque[Audit] = field(default_factory=lambda: deque(maxlen=MAX_AUDITS))
    num_requests: int = 0
    num_approximated: int = 0
    num_audited: int = 0
    num_watched: int = YOUNG_AUDITS

    @property
    def is_young(self) -> bool:
        """Whether its latest approximate request, counted already, is one of those that are audited one by one."""
        return self.num_approximated <= self.num_watched
