"""The rule of acceptance, once: for requests that are served, for tuning and for evaluations.

A request is served at the boldest rung that the grounds allow. Text unlike what they rest on is computed; where
recomputed tokens turn out further from their estimates than calibration has seen, the next safer rung is tried, and at
the end everything is computed. Serving asks step by step (`Acceptance`), replays all at once (`serve`): it is the same
rule, so they judge what a planner would have done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, SourcesRead
from kvcomm.align.ladder import Ladder, Rung
from kvcomm.align.levels import Grounds, ReaderBook
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy


class Acceptance:
    """The rule, for one request on its grounds.

    Attributes:
        level, num_pairs: whose pairs decide, and how many those are.
        index: of the rung in the ladder.
    """

    def __init__(self, level: Level, calibration: Calibration, index: int, confidence: float) -> None:
        self.level = level
        self.num_pairs = calibration.num_pairs
        self.index = index
        self._calibration = calibration
        self._confidence = confidence

    @property
    def ladder(self) -> Ladder:
        """The rungs, the safest first."""
        return self._calibration.ladder

    @property
    def rung(self) -> Rung:
        """The one to serve at."""
        return self.ladder[self.index]

    @property
    def predicted(self) -> float:
        """Nats that a request like this one is expected to stay within, with the caller's confidence."""
        return self._calibration.predicted(self.index, self._confidence)

    def is_like(self, distance: float) -> bool:
        """Whether a text is no further from the anchors than those calibrated."""
        return distance <= self._calibration.distance_limit

    def holds(self, residual: float | None) -> bool:
        """Whether recomputed tokens are as near to their estimates as calibration has seen at this rung."""
        return residual is None or residual <= self._calibration.residual_limit(self.index)

    def escalate(self) -> bool:
        """Go to the next safer rung; False if there is none: everything is to be computed."""
        if not self.index:
            return False
        self.index -= 1
        return True


def accept(grounds: Grounds, bound: Bound) -> Acceptance | None:
    """On these grounds, at which rung a request is served; None: no rung keeps the bound."""
    index = grounds.rung_index
    return None if index is None else Acceptance(grounds.level, grounds.calibration, index, bound.confidence)


def decide(
    book: ReaderBook,
    namespace: str,
    reader: Reader,
    ladders: Iterable[Ladder],
    policy: ReusePolicy,
    *,
    read: SourcesRead | None,
) -> Acceptance | Reason:
    """How a reader's request is served under a policy that is not exact, or why it is computed.

    Args:
        ladders: that could be used for it, the one that costs least first.
        read: of the sources of its prompt, see `ReaderBook.counts`.
    """
    ladders, bound = tuple(ladders), Bound(policy.max_divergence, policy.delta)
    if not ladders:
        return Reason.NO_ANCHORS
    grounds = book.grounds(namespace, reader, ladders, bound, policy.levels, read=read)
    if grounds is None:
        barred = any(book.is_barred(namespace, reader, level, bound) for level in policy.levels)
        return Reason.BREAKER if barred else Reason.UNCALIBRATED
    return accept(grounds, bound) or Reason.BOUND


class Replayed(Protocol):
    """What is known of one replay; see `reuse.replay.Outcome`."""

    @property
    def divergence(self) -> float:
        """Mean nats over the continuation."""
        ...

    @property
    def distance(self) -> float:
        """Distance of the text from what the estimator knows."""
        ...

    @property
    def residual(self) -> float | None:
        """Residual of the recomputed tokens; None where none were."""
        ...

    @property
    def num_recomputed(self) -> int:
        """Moved tokens that were computed after all."""
        ...


class Rungs(NamedTuple):
    """One prompt: its moved tokens, and what each rung of a ladder gave."""

    num_moved: int
    outcomes: Sequence[Replayed]


class Served(NamedTuple):
    """What an accepted request would have got."""

    divergence: float
    num_moved: int
    num_aligned: int


def serve(calibration: Calibration, prompt: Rungs, bound: Bound) -> Served | None:
    """What a request would have been served with, had it been this prompt; None: computed exactly.

    Args:
        prompt: with outcomes in the order of the calibration's ladder.
    """
    index = calibration.choose(*bound)
    if index is None:
        return None
    accepted = Acceptance(Level.OWN, calibration, index, bound.confidence)
    if not accepted.is_like(prompt.outcomes[index].distance):
        return None
    while not accepted.holds(prompt.outcomes[accepted.index].residual):
        if not accepted.escalate():
            return None
    outcome = prompt.outcomes[accepted.index]
    return Served(outcome.divergence, prompt.num_moved, prompt.num_moved - outcome.num_recomputed)
