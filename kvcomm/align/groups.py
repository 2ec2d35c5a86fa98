"""Edge groups: what is known about prompts of one template with the same segments moved into it.

A group goes through three stages. It *learns* until its edges have anchors enough; then it is *ranked* on a few
prompts: which segment, recomputed, buys most; from then on it is *calibrated*: every exact prompt adds a pair of what
each rung would have cost. Anchors and ladder are fixed before the first pair is taken, so pairs and later requests are
exchangeable, which the bound rests on. Groups know nothing of engines or pages.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcomm.align.breaker import Breaker
from kvcomm.align.calibration import Calibration
from kvcomm.align.edges import Edge
from kvcomm.align.moves import Move

NUM_RANKED = 6
"""Prompts on which segments are compared before the ladder is fixed."""


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

    @property
    def digest(self) -> str:
        """Hex digest for files and reports."""
        described = [[edge.digest, is_exact] for edge, is_exact in self.edges]
        return hashlib.sha256(json.dumps([described, self.estimator, self.shares]).encode()).hexdigest()


@dataclass
class Influence:
    """What recomputing each segment alone would buy, summed over the prompts tried."""

    gains: list[float]
    num_prompts: int = 0

    def add(self, gains: Sequence[float]) -> None:
        """Add one prompt: by how much the divergence falls, per recomputed token, one entry per segment."""
        self.gains = [total + gain for total, gain in zip(self.gains, gains, strict=True)]
        self.num_prompts += 1

    @property
    def order(self) -> tuple[int, ...]:
        """Segments, the most influential first; among equals the later one, which the answer reads last."""
        return tuple(sorted(range(len(self.gains)), key=lambda index: (-self.gains[index], -index)))


@dataclass(eq=False)
class EdgeGroup:
    """One group: its ladder, its calibration, its breakers, its counts. Guarded by its owner's lock."""

    key: GroupKey
    influence: Influence = field(init=False)
    calibration: Calibration = field(init=False)
    breakers: dict[tuple[float, float], Breaker] = field(default_factory=dict)
    audited: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    num_requests: int = 0
    num_approximated: int = 0

    def __post_init__(self) -> None:
        self.restart()

    @property
    def is_ranked(self) -> bool:
        """Whether the ladder is fixed."""
        return len(self.key.edges) == 1 or self.influence.num_prompts >= NUM_RANKED

    @property
    def order(self) -> tuple[int, ...]:
        """Segments in the order in which rungs recompute them."""
        return self.influence.order

    def breaker(self, bound: tuple[float, float]) -> Breaker:
        """The watch over one (epsilon, delta)."""
        return self.breakers.setdefault(bound, Breaker(bound[1]))

    def restart(self) -> None:
        """Forget ladder, pairs and breakers, as after a change of the anchors."""
        self.influence = Influence([0.0] * len(self.key.edges))
        self.calibration = Calibration(len(self.key.shares))
        self.breakers.clear()


class GroupBook:
    """Every group, tenant by tenant."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[GroupKey, EdgeGroup]] = {}

    def group(self, namespace: str, key: GroupKey) -> EdgeGroup:
        """The group with this key, made on first use."""
        groups = self._groups.setdefault(namespace, {})
        if key not in groups:
            groups[key] = EdgeGroup(key)
        return groups[key]

    def find(self, namespace: str, key: GroupKey) -> EdgeGroup | None:
        """The group with this key, if there is one."""
        return self._groups.get(namespace, {}).get(key)

    def groups(self, namespace: str) -> Iterator[EdgeGroup]:
        """Every group of a tenant."""
        yield from self._groups.get(namespace, {}).values()
