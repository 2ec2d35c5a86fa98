"""Calibration: what may be accepted for a caller's (epsilon, delta), from what replays of exact prompts cost.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814, Theorem 1) with the loss 1[divergence > epsilon]. The
theorem asks for a loss that cannot grow along the ladder, which a single prompt need not obey; so a rung's loss is the
largest of it and all costlier rungs', which is at least its own. It then promises: over the draw of pairs and the next
exchangeable prompt, the probability of a violation at the chosen rung is at most delta. Nothing here knows of models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from kvcomm.errors import InvalidRequest

MAX_PAIRS = 1000
DISTANCE_LEVEL = 0.99
"""Share of texts like the calibrated ones that pass for them."""
RESIDUAL_LEVEL = 0.98
"""Share of prompts whose recomputed tokens pass for as expected."""

_ROUNDING = 1e-9


class Pair(NamedTuple):
    """What one exact prompt showed.

    Attributes:
        divergences: nats, one per rung, from the cheapest to the costliest.
        distance: of its text from the anchors.
        residuals: of the recomputed tokens, one per rung; None where none were.
    """

    divergences: tuple[float, ...]
    distance: float
    residuals: tuple[float | None, ...]


class Calibration:
    """The newest pairs of one edge group. Guarded by its owner's lock."""

    def __init__(self, num_rungs: int, pairs: Sequence[Pair] = (), max_pairs: int = MAX_PAIRS) -> None:
        self.num_rungs = num_rungs
        self._pairs: deque[Pair] = deque(maxlen=max_pairs)
        for pair in pairs:
            self.add(pair)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, the oldest first."""
        return tuple(self._pairs)

    @property
    def num_pairs(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    def copy(self) -> Calibration:
        """Another one with the same pairs, that follows nothing."""
        made = Calibration(self.num_rungs)
        made._pairs = self._pairs.copy()
        return made

    def add(self, pair: Pair) -> None:
        """Add a pair, in place of the oldest if there are too many.

        Raises:
            InvalidRequest: not one value per rung, or a number that is negative or not finite.
        """
        if len(pair.divergences) != self.num_rungs or len(pair.residuals) != self.num_rungs:
            raise InvalidRequest(f"a pair needs {self.num_rungs} divergences and residuals, got {pair}")
        numbers = [*pair.divergences, pair.distance, *(value for value in pair.residuals if value is not None)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise InvalidRequest(f"a pair holds finite numbers >= 0, got {pair}")
        self._pairs.append(pair)

    def choose(self, epsilon: float, delta: float) -> int | None:
        """The cheapest rung that keeps P(divergence > epsilon) <= delta; None: none does, or too few pairs."""
        count = self.num_pairs
        worst = [0.0] * count
        chosen = None
        for rung in reversed(range(self.num_rungs)):
            worst = [max(so_far, pair.divergences[rung]) for so_far, pair in zip(worst, self._pairs, strict=True)]
            num_violations = sum(value > epsilon for value in worst)
            if (num_violations + 1) / (count + 1) <= delta + _ROUNDING:
                chosen = rung
        return chosen

    @staticmethod
    def pairs_needed(delta: float) -> int:
        """Pairs without a single violation from which on anything can be accepted."""
        return math.ceil(1 / delta - 1 - _ROUNDING)

    @property
    def distance_limit(self) -> float | None:
        """Largest distance of a text that passes for like the calibrated ones; None without pairs."""
        return _quantile([pair.distance for pair in self._pairs], DISTANCE_LEVEL)

    def residual_limit(self, rung: int) -> float | None:
        """Largest residual at a rung that passes for as expected; None where nothing is recomputed."""
        return _quantile([each for pair in self._pairs if (each := pair.residuals[rung]) is not None], RESIDUAL_LEVEL)

    def predicted(self, rung: int, level: float) -> float:
        """Nats that a share `level` of prompts stays within at a rung; infinite without pairs."""
        found = _quantile([pair.divergences[rung] for pair in self._pairs], level)
        return math.inf if found is None else found

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"num_rungs": self.num_rungs, "pairs": [list(pair) for pair in self._pairs]}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From a file.

        Raises:
            InvalidRequest: not what `to_json` gives; names the field.
        """
        try:
            num_rungs, pairs = int(value["num_rungs"]), [_pair(entry) for entry in value["pairs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"a calibration needs 'num_rungs' and 'pairs' of numbers: {error!r}") from error
        if num_rungs < 1:
            raise InvalidRequest(f"num_rungs must be at least 1, not {num_rungs}")
        return cls(num_rungs, pairs)


def _pair(entry: Any) -> Pair:
    divergences, distance, residuals = entry
    return Pair(
        tuple(float(value) for value in divergences),
        float(distance),
        tuple(None if value is None else float(value) for value in residuals),
    )


def _quantile(values: Sequence[float], level: float) -> float | None:
    """The conformal quantile: a further exchangeable value exceeds it with probability 1 - level at most.

    With too few values for the level, the largest one.
    """
    if not values:
        return None
    rank = math.ceil((len(values) + 1) * level - _ROUNDING)
    return sorted(values)[min(rank, len(values)) - 1]
