"""Which replicas a request may go to, in what order: the policy of `routing` and `pinning` over what replicas tell.

A router hears from replicas twice a second at best, so it also remembers where it sent what. Knows nothing about Ray;
`router` is the class that Ray calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcomm.integrations.ray.holding import HELD, LOAD, RESTORED, Recent
from kvcomm.integrations.ray.messages import ForwardedRequest
from kvcomm.integrations.ray.pinning import owner, pin_of
from kvcomm.integrations.ray.routing import DEFAULT_POLICY, Policy, rank

MAX_REMEMBERED = 32_768
MEAN_TOKENS = 512
"""Of a request that a replica has not told about yet."""

ReplicaStats = Mapping[str, Mapping[str, Any]]
"""What replicas told last, by replica."""


class ReplicaChooser:
    """Orders replicas for requests. One per router; used from one thread."""

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._sent = Recent(MAX_REMEMBERED)  # key -> replica
        self._families = Recent(MAX_REMEMBERED)  # family -> replica

    def order(self, asked: ForwardedRequest, stats: ReplicaStats, num_waiting: Mapping[str, int]) -> list[str]:
        """Replicas to try, the best first; for a pinned request the only one.

        Args:
            stats: of every replica that there is.
            num_waiting: requests that each has now, as far as this router knows.
        """
        pin = None if asked.context_id is None else pin_of(asked.context_id)
        if pin is not None:
            has = owner(pin, stats, self._heir(pin.family, stats))
            return [] if has is None else [has]
        wanted = asked.wanted
        holders = self._holders(set(wanted.all_keys()), stats)
        loads = {replica: _load(stats[replica], num_waiting.get(replica, 0)) for replica in stats}
        return rank(wanted, holders, loads, policy=self._policy)

    def sent(self, asked: ForwardedRequest, replica: str) -> None:
        """Remember where a request went."""
        pin = None if asked.context_id is None else pin_of(asked.context_id)
        if pin is not None:
            self._families.put(pin.family, replica)
        for key in asked.wanted.all_keys():
            self._sent.put(key, replica)

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        for recent in (self._sent, self._families):
            for name, where in recent.items().items():
                if where == replica:
                    recent.drop(name)

    def _heir(self, family: str, stats: ReplicaStats) -> str | None:
        told = next((replica for replica, each in stats.items() if family in each.get(RESTORED, ())), None)
        return self._families.get(family) if told is None else told

    def _holders(self, keys: set[str], stats: ReplicaStats) -> dict[str, set[str]]:
        holders: dict[str, set[str]] = {}
        for replica, each in stats.items():
            for key in keys.intersection(each.get(HELD, ())):
                holders.setdefault(key, set()).add(replica)
        for key in keys:
            if (last := self._sent.get(key)) is not None:
                holders.setdefault(key, set()).add(last)
        return holders


def _load(told: Mapping[str, Any], num_waiting: int) -> float:
    return max(float(told.get(LOAD, 0)), num_waiting * MEAN_TOKENS)
