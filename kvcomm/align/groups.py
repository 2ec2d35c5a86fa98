"""Edge groups: what is known about prompts of one template with the same segments moved into it.

A group goes through three stages. It *learns* until its edges have anchors enough; then there is a *contest* on a few
prompts: how strongly to correct, if that beats moving alone; from then on it is *calibrated*: every exact prompt adds a
pair of what each rung would have cost. Anchors and strength are fixed before the first pair is taken, so pairs and
later requests are exchangeable, which the bound rests on. Groups know nothing of engines or pages.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcomm.align.bound import Bound
from kvcomm.align.breaker import Breaker
from kvcomm.align.calibration import Calibration
from kvcomm.align.edges import Edge
from kvcomm.align.importance import ImportanceFit
from kvcomm.align.moves import Move
from kvcomm.config import NUM_CONTESTED

MIN_GAIN = 0.1
"""Share of the divergence that a correction has to take away to be used."""


class GroupKey(NamedTuple):
    """What makes prompts comparable.

    Attributes:
        edges: of the moved segments in order of the prompt, each with whether its source is exact.
        estimator: how they are corrected.
        shares: the rungs.
    """

    edges: tuple[tuple[Edge, bool], ...]
    estimator: str
    shares: tuple[float, ...]

    @classmethod
    def of(cls, moves: Sequence[Move], estimator: str, shares: tuple[float, ...]) -> GroupKey:
        """The key of a prompt's moves."""
        return cls(tuple((move.edge, move.is_exact) for move in moves), estimator, shares)

    def is_like(self, other: GroupKey) -> bool:
        """Whether both differ at most in which sources are exact."""
        edges = [[edge for edge, _ in key.edges] for key in (self, other)]
        return edges[0] == edges[1] and (self.estimator, self.shares) == (other.estimator, other.shares)

    @property
    def digest(self) -> str:
        """Hex digest for files and reports."""
        described = [[edge.digest, is_exact] for edge, is_exact in self.edges]
        return hashlib.sha256(json.dumps([described, self.estimator, self.shares]).encode()).hexdigest()


@dataclass
class Contest:
    """How strongly to correct: divergences at each of an estimator's strengths, over the prompts tried.

    Attributes:
        strengths: factors on the correction, the last one 0: moved only.
        num_wanted: prompts on which they are compared before one is fixed.
        totals: nats, summed over prompts, one per strength.
    """

    strengths: tuple[float, ...]
    num_wanted: int
    totals: list[float] = field(default_factory=list)
    num_prompts: int = 0

    def __post_init__(self) -> None:
        self.totals = self.totals or [0.0] * len(self.strengths)

    def add(self, divergences: Sequence[float]) -> None:
        """Add one prompt: nats, one entry per strength."""
        self.totals = [total + value for total, value in zip(self.totals, divergences, strict=True)]
        self.num_prompts += 1

    @property
    def is_over(self) -> bool:
        """Whether the strength is fixed."""
        return len(self.strengths) == 1 or self.num_prompts >= self.num_wanted

    @property
    def winner(self) -> float:
        """The best strength; a correction that gains too little to be sure of is left out."""
        best = min(range(len(self.strengths)), key=lambda index: self.totals[index])
        gains = self.totals[best] <= (1 - MIN_GAIN) * self.totals[-1]
        return self.strengths[best] if gains else self.strengths[-1]


class Audit(NamedTuple):
    """One approximate request held against exact computation.

    Attributes:
        at_s: when, on the monotonic clock.
        divergence: nats, measured.
        predicted: nats; what calibration expected at most.
        bound: that the caller asked for, a `Bound` or such a pair.
    """

    at_s: float
    divergence: float
    predicted: float
    bound: tuple[float, float]

    @property
    def is_violation(self) -> bool:
        """Whether it broke the bound; a divergence that is no number does."""
        return not self.divergence <= self.bound[0]


@dataclass(eq=False)
class EdgeGroup:
    """One group: its strength, its calibration, its breakers, its counts. Guarded by its owner's lock.

    Attributes:
        head_weights: how rungs choose tokens, see `importance`; fixed before the first pair.
    """

    key: GroupKey
    strengths: tuple[float, ...]
    num_contested: int = NUM_CONTESTED
    contest: Contest = field(init=False)
    calibration: Calibration = field(init=False)
    head_weights: tuple[float, ...] | None = field(default=None, init=False)
    breakers: dict[Bound, Breaker] = field(default_factory=dict)
    audits: deque[Audit] = field(default_factory=lambda: deque(maxlen=1000))
    num_requests: int = 0
    num_approximated: int = 0
    num_audited: int = 0

    def __post_init__(self) -> None:
        self.restart()

    @property
    def strength(self) -> float:
        """The factor on corrections."""
        return self.contest.winner

    def breaker(self, bound: tuple[float, float]) -> Breaker:
        """The watch over one bound, which may be given as a pair."""
        bound = Bound(*bound)
        return self.breakers.setdefault(bound, Breaker(bound.delta))

    def copy(self) -> EdgeGroup:
        """What is known of the group now, without its audits and counts; follows nothing."""
        made = EdgeGroup(self.key, self.strengths, self.num_contested)
        made.contest, made.calibration = deepcopy(self.contest), self.calibration.copy()
        made.head_weights, made.breakers = self.head_weights, deepcopy(self.breakers)
        return made

    def restart(self) -> None:
        """Forget strength, pairs and breakers, as after a change of the anchors."""
        self.contest = Contest(self.strengths, self.num_contested)
        self.calibration = Calibration(len(self.key.shares))
        self.head_weights = None
        self.breakers.clear()


class GroupBook:
    """Every group, tenant by tenant."""

    def __init__(self, num_contested: int = NUM_CONTESTED) -> None:
        """Args:
        num_contested: prompts on which a group compares strengths.
        """
        self._num_contested = num_contested
        self._groups: dict[str, dict[GroupKey, EdgeGroup]] = {}
        self._fits: dict[str, ImportanceFit] = {}

    def group(self, namespace: str, key: GroupKey, strengths: tuple[float, ...]) -> EdgeGroup:
        """The group with this key, made on first use for an estimator with these strengths.

        It begins with the strength of a group that differs only in which sources are exact, if that has one.
        """
        groups = self._groups.setdefault(namespace, {})
        if key not in groups:
            made = groups[key] = EdgeGroup(key, strengths, self._num_contested)
            alike = (group for group in groups.values() if group.key.is_like(key) and group.contest.is_over)
            made.contest = next((group.contest for group in alike), made.contest)
        return groups[key]

    def importance_fit(self, namespace: str) -> ImportanceFit:
        """What a tenant's contests tell about heads; all groups share it, as heads are the model's."""
        return self._fits.setdefault(namespace, ImportanceFit())

    def head_weights(self, namespace: str, key: GroupKey) -> tuple[float, ...] | None:
        """Those of a group with these edges and this estimator, whatever its rungs, else what contests tell by now."""
        alike = (group for group in self.groups(namespace) if group.key._replace(shares=key.shares) == key)
        known = (group.head_weights for group in alike if group.head_weights is not None)
        return next(known, None) or self.importance_fit(namespace).weights()

    def find(self, namespace: str, key: GroupKey) -> EdgeGroup | None:
        """The group with this key, if there is one."""
        return self._groups.get(namespace, {}).get(key)

    def rest_on(self, namespace: str, edge: Edge) -> list[EdgeGroup]:
        """Groups that have begun to compare or calibrate with the anchors of an edge: those must stay as they are."""
        return [
            group
            for group in self.groups(namespace)
            if (group.contest.num_prompts or group.calibration.num_pairs)
            and any(edge == each for each, _ in group.key.edges)
        ]

    def put(self, namespace: str, group: EdgeGroup) -> None:
        """Take a group in, in place of the one with the same key."""
        self._groups.setdefault(namespace, {})[group.key] = group

    def forget(self, namespace: str) -> None:
        """Forget every group of a tenant."""
        self._groups.pop(namespace, None)
        self._fits.pop(namespace, None)

    def groups(self, namespace: str) -> Iterator[EdgeGroup]:
        """Every group of a tenant."""
        yield from self._groups.get(namespace, {}).values()
