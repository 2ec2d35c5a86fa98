"""The statistics of a bound: what decides about moved text, to replay decisions and to hold them against the truth.

Pairs are what was measured, a calibration is what they say along a ladder, grounds are a calibration that has the say
for a reader, and `serve` is the rule by which an engine accepts. Intervals tell what a count of violations can mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Measured, Pair
from kvcomm.align.intervals import Interval, violation_limit, wilson
from kvcomm.align.levels import Grounds, ReaderBook
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Audit, Level
from kvcomm.engine.engine import Engine
from kvcomm.reuse.decision import Rungs, serve
from kvcomm.tiers.space import DEFAULT_TENANT

__all__ = [
    "Audit",
    "Bound",
    "Calibration",
    "Grounds",
    "Interval",
    "Level",
    "Measured",
    "Pair",
    "ReaderBook",
    "Rungs",
    "add_pair",
    "pairs_of",
    "serve",
    "violation_limit",
    "wilson",
]


def pairs_of(engine: Engine, level: Level, reader: str = "", *, tenant: str = DEFAULT_TENANT) -> Sequence[Pair]:
    """The pairs that an engine has at a level, the oldest first.

    Args:
        reader: digest of the one whose own pairs are wanted; one that is unknown has none.
    """
    book, namespace = engine.reuse.parts.book, engine.namespace(tenant)
    with engine.lock:
        if level is Level.POOL:
            return book.pool(namespace)
        if level is Level.PRIOR:
            return tuple(book.prior)
        standing = book.find(namespace, reader)
        return () if standing is None else tuple(standing.pairs)


def add_pair(engine: Engine, reader: Reader, pair: Pair, *, tenant: str = DEFAULT_TENANT) -> None:
    """Let an engine know a pair that was measured before, as if it had measured it now."""
    with engine.lock:
        engine.reuse.parts.book.add(engine.namespace(tenant), reader, pair)
