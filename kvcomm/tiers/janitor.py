"""Keeping a tier within bytes and age: what was used longest ago goes first.

Only kvcomm's own objects are looked at. Several janitors may work at once, and beside readers and writers: removing
what is gone already is no error, whoever reads an object reads on or misses it, and what is being written is not
listed. Of objects used at the same time the later written goes first, so that a prefix loses its end before its
beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcomm.plain import Plain
from kvcomm.tiers.keys import ROOT
from kvcomm.tiers.store import ObjectStore, StoredObject

KEEP_SHARE = 0.9
"""Of the budget that is left full, so that not every write makes another one go."""


@dataclass(frozen=True)
class Swept(Plain):
    """What a janitor did.

    Attributes:
        num_objects, num_bytes: that are there afterwards.
        removed_objects, removed_bytes: that were removed, or would be.
        leftovers: of killed writers, removed.
    """

    num_objects: int
    num_bytes: int
    removed_objects: int
    removed_bytes: int
    leftovers: int


def sweep(
    store: ObjectStore,
    *,
    max_bytes: int | None = None,
    max_age_s: float | None = None,
    bad: Iterable[str] = (),
    is_dry: bool = False,
    clock: Callable[[], float] = time.time,
) -> Swept:
    """Remove what is too much, too old, bad, or left by killed writers.

    Args:
        max_bytes: of all objects together; where there are more, they are brought down to nine tenths of it.
        max_age_s: since an object was used.
        bad: keys of objects that go in any case.
        is_dry: only say what would be removed.

    Raises:
        StoreFailed: the store cannot be listed, or an object not be removed.
    """
    found = list(store.list(ROOT))
    going = chosen(found, max_bytes=max_bytes, oldest_s=None if max_age_s is None else clock() - max_age_s, bad=bad)
    leftovers = 0
    if not is_dry:
        for each in going:
            store.delete(each.key)
        leftovers = store.sweep()
    num_bytes, removed_bytes = (sum(each.num_bytes for each in some) for some in (found, going))
    return Swept(len(found) - len(going), num_bytes - removed_bytes, len(going), removed_bytes, leftovers)


def chosen(
    found: Iterable[StoredObject], *, max_bytes: int | None, oldest_s: float | None, bad: Iterable[str]
) -> list[StoredObject]:
    """The objects that go, of those found; see `sweep`."""
    bad = frozenset(bad)
    going: list[StoredObject] = []
    staying: list[StoredObject] = []
    for each in found:
        is_old = oldest_s is not None and each.used_s < oldest_s
        (going if is_old or each.key in bad else staying).append(each)
    num_bytes = sum(each.num_bytes for each in staying)
    if max_bytes is None or num_bytes <= max_bytes:
        return going
    for each in sorted(staying, key=lambda each: (each.used_s, -each.modified_s, each.key)):
        if num_bytes <= KEEP_SHARE * max_bytes:
            break
        going.append(each)
        num_bytes -= each.num_bytes
    return going
