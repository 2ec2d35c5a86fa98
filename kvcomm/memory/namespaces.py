"""The namespaces of a radix tree: which there are, what each holds, and how long one is remembered that holds nothing.

Whoever has something cached or a quota is known. Of those that have neither any more, the latest few are remembered,
so that it can be told why their prompts miss; of the others only the sum of their counters is left. So many tenants
that each came once leave no more behind than a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvcomm.memory.node import MissReason, Namespace

MAX_FORMER = 32
"""Namespaces that hold nothing any more and are remembered."""


class NamespaceUsage(NamedTuple):
    """What a namespace holds, and what became of its tokens so far."""

    num_tokens: int
    num_pages: int  # distinct pages
    quota_pages: int | None
    query_tokens: int  # asked for by `RadixTree.match`
    hit_tokens: int  # of those found
    evicted_tokens: int
    expired_tokens: int
    quota_tokens: int  # dropped for the namespace's own quota


class Namespaces:
    """Namespaces by name; iterating gives all that are known, with those that are only remembered."""

    def __init__(self) -> None:
        self._known: dict[str, Namespace] = {}
        self._forgotten = Namespace("")  # the counters of all that are not known any more

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def look(self, name: str) -> Namespace:
        """That namespace for reading: an empty one, which stays unknown, if it is not known."""
        return self._known.get(name) or Namespace(name)

    def enter(self, name: str) -> Namespace:
        """That namespace for writing; known from now on."""
        if name not in self._known:
            self._forget_former()
            self._known[name] = Namespace(name)
        return self._known[name]

    def names(self) -> tuple[str, ...]:
        """Those that hold something or have a quota."""
        return tuple(name for name, space in self._known.items() if not space.is_empty)

    def usage(self, name: str) -> NamespaceUsage:
        """Sizes and counters of one; all zero if it is not known."""
        return _usage(self.look(name))

    def total_usage(self) -> NamespaceUsage:
        """Sizes and counters over all, also over those that are forgotten; no quota."""
        total = Namespace("")
        for space in (self._forgotten, *self):
            total.count(space)
        return _usage(total)

    def _forget_former(self) -> None:
        """Remember only the latest of those that hold nothing any more."""
        former = sorted((space for space in self if space.is_empty), key=lambda space: space.root.used)
        for space in former[: max(0, len(former) - MAX_FORMER)]:
            self._forgotten.count(space)
            del self._known[space.name]


def _usage(space: Namespace) -> NamespaceUsage:
    return NamespaceUsage(
        space.num_tokens,
        space.num_pages,
        space.quota_pages,
        space.query_tokens,
        space.hit_tokens,
        *(space.dropped_tokens[r] for r in (MissReason.EVICTED, MissReason.EXPIRED, MissReason.QUOTA)),
    )
