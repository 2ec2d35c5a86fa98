"""Calibration: what may be accepted for a caller's (epsilon, delta), from what replays of exact prompts cost.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814, Theorem 1) with the loss 1[divergence > epsilon]. The
theorem asks for a loss that cannot fall from one rung to a bolder one, which a single prompt need not obey; so a rung's
loss is the largest of its own and all safer rungs'. It then promises: over the draw of pairs and of a further prompt
exchangeable with them, the probability that a rung is chosen and the prompt breaks the bound there is at most delta.
Nothing here knows of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcomm.align.ladder import Ladder, Rung
from kvcomm.align.moves import Move, num_moved
from kvcomm.errors import InvalidRequest

DISTANCE_LEVEL = 0.99
"""Share of texts like the calibrated ones that pass for them."""
RESIDUAL_LEVEL = 0.98
"""Share of prompts whose recomputed tokens pass for as expected."""

_ROUNDING = 1e-9
"""Shares such as 1 - 0.95 are not exactly what they say."""

FloatArray = npt.NDArray[np.float64]


class Measured(NamedTuple):
    """What one rung gave on one prompt.

    Attributes:
        divergence: nats.
        residual: of the recomputed tokens; None where none were.
    """

    divergence: float
    residual: float | None = None


class SourcesRead(StrEnum):
    """How many of a prompt's sources had read all that stands before them there.

    Known before anything is moved, and telling like nothing else: prompts of unlike kinds are told apart wherever pairs
    of several readers are pooled. Documents that nobody has read together are `NONE`, what agents say to each other
    is `SOME`.
    """

    ALL = "all"
    SOME = "some"
    NONE = "none"


class Sources(NamedTuple):
    """Where the moved text of a prompt came from. Told, not conditioned on: prompts of one reader differ in these.

    Attributes:
        num_segments: that were moved.
        num_approximate: of these, from KV that is not exact itself.
        num_unread: of these, from a context that had not read all that stands before them in the prompt.
        num_tokens: that were moved.
    """

    num_segments: int = 0
    num_approximate: int = 0
    num_unread: int = 0
    num_tokens: int = 0

    @property
    def read(self) -> SourcesRead:
        """How many sources had read all that stands before them in the prompt."""
        if not self.num_unread:
            return SourcesRead.ALL
        return SourcesRead.SOME if self.num_unread < self.num_segments else SourcesRead.NONE


def sources_of(moves: Sequence[Move]) -> Sources:
    """Where moved text comes from."""
    return Sources(
        num_segments=len(moves),
        num_approximate=sum(not move.is_exact for move in moves),
        num_unread=sum(move.num_unread > 0 for move in moves),
        num_tokens=num_moved(moves),
    )


@dataclass(frozen=True)
class Pair:
    """What one exact prompt showed.

    Attributes:
        measured: by rung; those that could be measured.
        distances: of its text from the anchors, by estimator.
        sources: of what was moved.

    Raises:
        InvalidRequest: a divergence, residual or distance that is negative or not finite.
    """

    measured: Mapping[Rung, Measured]
    distances: Mapping[str, float] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources)

    def __post_init__(self) -> None:
        numbers = [value for each in self.measured.values() for value in each if value is not None]
        numbers += self.distances.values()
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise InvalidRequest(f"a pair holds finite numbers >= 0, got {self}")


def pairs_needed(delta: float) -> int:
    """How many pairs it takes until anything can be accepted, if none of them breaks the bound.

    Args:
        delta: in (0, 1); for `delta / (1 + k)` it is the number for which k of them may.
    """
    return math.ceil(1 / delta - 1 - _ROUNDING)


class Calibration:
    """Pairs, seen along a ladder of at least one rung; those that lack one of its rungs do not count. Never changes."""

    def __init__(self, ladder: Ladder, pairs: Sequence[Pair]) -> None:
        self.ladder = ladder
        self._pairs: list[Pair] = []
        self._measured: list[list[Measured]] = []  # by pair and rung
        for pair in pairs:
            measured = [found for rung in ladder if (found := pair.measured.get(rung)) is not None]
            if len(measured) == len(ladder):
                self._pairs.append(pair)
                self._measured.append(measured)

    @property
    def num_pairs(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    def choose(self, epsilon: float, delta: float) -> int | None:
        """The boldest rung that keeps P(divergence > epsilon) <= delta; None: none does, or too few pairs.

        Args:
            delta: below 1; 0 or less is what nothing keeps.
        """
        num_violations = (self._worst > epsilon).sum(0)
        kept = np.flatnonzero((num_violations + 1) / (self.num_pairs + 1) <= delta + _ROUNDING)
        return int(kept[-1]) if len(kept) else None

    @cached_property
    def distance_limit(self) -> float:
        """Largest distance of a text that passes for like the calibrated ones; infinite where none has a distance."""
        name = self.ladder[0].estimator
        return _quantile([pair.distances[name] for pair in self._pairs if name in pair.distances], DISTANCE_LEVEL)

    def residual_limit(self, rung: int) -> float:
        """Largest residual at a rung that passes for as expected; infinite where nothing is recomputed."""
        residuals = [measured[rung].residual for measured in self._measured]
        return _quantile([each for each in residuals if each is not None], RESIDUAL_LEVEL)

    def predicted(self, rung: int, level: float) -> float:
        """Nats that a share `level` of prompts stays within at a rung; infinite without pairs.

        Where there are too few pairs to tell, the largest of them.
        """
        return _quantile(self._divergences[:, rung].tolist(), level)

    @cached_property
    def _divergences(self) -> FloatArray:
        """[num_pairs, num_rungs] nats."""
        rows = [[each.divergence for each in measured] for measured in self._measured]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.ladder))

    @cached_property
    def _worst(self) -> FloatArray:
        """[num_pairs, num_rungs] nats, of each rung and all safer ones."""
        return np.maximum.accumulate(self._divergences, axis=1)


def _quantile(values: Sequence[float], level: float) -> float:
    """The conformal quantile: a further exchangeable value exceeds it with probability 1 - level at most.

    With too few values for the level, the largest one; with none, infinity.
    """
    if not values:
        return math.inf
    rank = math.ceil((len(values) + 1) * level - _ROUNDING)
    return sorted(values)[min(rank, len(values)) - 1]
