"""Which worker should serve a request: the policy alone, without Ray, clocks or sockets.

A request is known by what workers could hold of it (`Wanted`): a chain of keys over the leading runs of its prompt,
each of which stands for everything before it as well, and keys of segments that may be moved from where they stand. A
worker is known by its load, in tokens that it has still to compute, and by the keys that it was seen to hold.

The order of workers is that of their cost: tokens of the request that are not held there, weighed by `thrift`, and the
load beyond the least loaded worker's. So the holder of the deepest prefix comes first until it is busier by more than
that saves, then it is passed over. Loads within `slack` of the least count as equal, because what a router knows of
loads is never quite new; among equals rendezvous hashing of the request's first key decides. Several routers that know
nothing of each other therefore send a new prompt to the same worker, and a worker that goes takes only its own prompts
with it.

What routers know may be wrong: a holder may have evicted what it held. That costs time and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

DEFAULT_SLACK = 256
DEFAULT_THRIFT = 2.0
DEFAULT_SEGMENT_WORTH = 0.8
DEFAULT_TIER_COST = 0.1

NOTHING: frozenset[str] = frozenset()


class PromptPrefix(NamedTuple):
    """A leading run of a prompt. `key` stands for all tokens in [0, end)."""

    key: str
    end: int


class MovableText(NamedTuple):
    """A text at [start, end) of a prompt that a worker could move there from another prompt."""

    key: str
    start: int
    end: int


@dataclass(frozen=True)
class Wanted:
    """What workers could hold of a request.

    Attributes:
        num_tokens: of the whole prompt.
        runs: leading runs, the shortest first; none where the prompt is shorter than a run.
        segments: in the order of the prompt, without overlap; empty where the caller wants exact answers only.
        tier_tokens: leading tokens that a shared tier has for every worker.
    """

    num_tokens: int
    runs: tuple[PromptPrefix, ...] = ()
    segments: tuple[MovableText, ...] = ()
    tier_tokens: int = 0

    @property
    def first_key(self) -> str:
        """What the request is hashed by: its first run, its first segment, or nothing."""
        return self.runs[0].key if self.runs else self.segments[0].key if self.segments else ""

    def all_keys(self) -> tuple[str, ...]:
        """All keys of it: what a worker holds after it has served the request."""
        return (*(run.key for run in self.runs), *(segment.key for segment in self.segments))


@dataclass(frozen=True)
class Policy:
    """How much is worth what, in tokens of prefill.

    Attributes:
        slack: tokens; loads that differ by less are the same.
        thrift: what a token that has to be computed weighs, beside one that is waited for: whoever computes what
            another holds makes those wait who come later, too. At least 1; about 1 / (1 - utilisation).
        segment_worth: part of a moved segment's tokens that need not be computed, in [0, 1].
        tier_cost: what a token from the tier costs, of what computing it costs, in [0, 1].
    """

    slack: float = DEFAULT_SLACK
    thrift: float = DEFAULT_THRIFT
    segment_worth: float = DEFAULT_SEGMENT_WORTH
    tier_cost: float = DEFAULT_TIER_COST

    def __post_init__(self) -> None:
        if self.slack < 0:
            raise ValueError(f"slack must not be negative, not {self.slack}")
        if self.thrift < 1:
            raise ValueError(f"thrift must be at least 1, not {self.thrift}")
        for name in ("segment_worth", "tier_cost"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")


DEFAULT_POLICY = Policy()


def rank(
    wanted: Wanted,
    holders: Mapping[str, Collection[str]],
    loads: Mapping[str, float],
    *,
    policy: Policy = DEFAULT_POLICY,
) -> list[str]:
    """Workers in the order in which to ask them, the best first.

    Args:
        wanted: the request.
        holders: key -> workers that hold it; keys that nobody holds may be missing, workers that `loads` does not name
            are ignored.
        loads: worker -> tokens that it has still to compute. Where only a number of requests is known: that number
            times the mean of their prompts. Of many workers, `candidates` are enough to find the first.
        policy: what is worth what.

    Returns:
        All workers of `loads`; empty if there is none.
    """
    if not loads:
        return []
    saved = _tokens_saved(wanted, holders, loads, policy)
    nobody = _value(wanted, 0, 0.0, policy)
    least = min(loads.values())

    def order(worker: str) -> tuple[float, int]:
        missing = wanted.num_tokens - saved.get(worker, nobody)
        lead = max(loads[worker] - least - policy.slack, 0)
        return missing * policy.thrift + lead, -rendezvous(wanted.first_key, worker)

    return sorted(loads, key=order)


def candidates(
    wanted: Wanted, holders: Mapping[str, Collection[str]], loads: Mapping[str, float], near: Collection[str]
) -> dict[str, float]:
    """The loads of workers among which the first of all is, so that a router of many need not look at every one.

    A worker that holds less than one that is as idle as any is never the first; so prefixes are gone through from the
    deepest up to the first that such a worker holds.

    Args:
        near: the workers whose load is within the slack of the least, or enough of them.
    """
    found = set(near)
    for segment in wanted.segments:
        found.update(holders.get(segment.key, NOTHING))
    for run in reversed(wanted.runs):
        held = holders.get(run.key, NOTHING)
        if any(worker in held for worker in near):
            break
        found.update(held)
    return {worker: loads[worker] for worker in found if worker in loads}


@lru_cache(maxsize=65_536)  # prompts that begin alike ask again and again
def rendezvous(key: str, worker: str) -> int:
    """How much `worker` attracts `key`, in [0, 2**64): the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{key}|{worker}".encode(), digest_size=8).digest(), "big")


def _tokens_saved(
    wanted: Wanted, holders: Mapping[str, Collection[str]], workers: Collection[str], policy: Policy
) -> dict[str, float]:
    """Tokens that each worker which holds anything need not compute."""
    depths: dict[str, int] = {}
    for run in wanted.runs:  # deeper ones overwrite: a key stands for everything before it
        depths.update((worker, run.end) for worker in _among(workers, holders.get(run.key, NOTHING)))
    moved: dict[str, float] = {}
    for segment in wanted.segments:
        for worker in _among(workers, holders.get(segment.key, NOTHING)):
            beyond = segment.end - max(segment.start, depths.get(worker, 0), wanted.tier_tokens)
            moved[worker] = moved.get(worker, 0.0) + max(beyond, 0) * policy.segment_worth
    return {worker: _value(wanted, depths.get(worker, 0), moved.get(worker, 0.0), policy) for worker in depths | moved}


def _value(wanted: Wanted, depth: int, moved: float, policy: Policy) -> float:
    """Tokens saved by a held prefix of `depth`, by what the tier has beyond it, and by moved text beyond both."""
    return depth + max(wanted.tier_tokens - depth, 0) * (1 - policy.tier_cost) + moved


def _among(workers: Collection[str], found: Iterable[str]) -> Iterable[str]:
    return (worker for worker in found if worker in workers)
