"""Nodes of the radix tree and what can be computed from one node alone; the namespaces that they hang below.

A node owns the tokens [start, end) of a path and one reference to each page that overlaps them, so a boundary
in mid-page is covered by both neighbors: by the same page after a split, by two different ones after
copy-on-write. `parent` and `children` always mirror each other; a node without parent that is no root has
left the tree. Knows neither queues nor reference counts.

Whoever has something cached or a quota is known as a namespace. Of those that have neither any more, the latest few are
remembered, so that it can be told why their prompts miss; of the others only the sum of their counters is left. So many
tenants that each came once leave no more behind than a few.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcomm.memory.pool import PageIds
from kvcomm.memory.rhythm import Rhythm

TokenIds = npt.NDArray[np.int32]

NO_IDS: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
MAX_FORMER = 32
"""Namespaces that hold nothing any more and are remembered."""

_MAX_TOMBSTONES = 64
_MAX_DROPS = 64
_HEAD_TOKENS = 16
_FIRST_CHUNK, _LAST_CHUNK = 128, 65_536


class MissReason(StrEnum):
    """Why matching stopped where it did."""

    NEW = "new"
    EVICTED = "evicted"
    EXPIRED = "expired"
    QUOTA = "quota"


class Use(NamedTuple):
    """When something was used: order among all uses, and seconds of the tree's clock."""

    tick: int
    at_s: float


class Drop(NamedTuple):
    """Tokens [start, start + num_tokens) of some path, gone from the tree.

    Attributes:
        at_s: when, on the tree's clock.
        head: the first few of the tokens, to tell what it was.
        reason: evicted, expired, quota or reset.
    """

    at_s: float
    start: int
    num_tokens: int
    head: tuple[int, ...]
    reason: str


class Tombstone(NamedTuple):
    """What is remembered of tokens that went: why, and of a node how it had been visited until when."""

    reason: MissReason
    used_at_s: float
    rhythm: Rhythm | None


class Namespace:
    """One root and the counters of what hangs below it; `num_pages` counts distinct pages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = Node(self, None, NO_IDS, 0, NO_IDS, Use(0, 0.0), math.inf)
        self.quota_pages: int | None = None
        self.num_tokens = 0
        self.num_pages = 0
        self.query_tokens = 0
        self.hit_tokens = 0
        self.dropped_tokens = dict.fromkeys((MissReason.EVICTED, MissReason.EXPIRED, MissReason.QUOTA), 0)
        self.drops: deque[Drop] = deque(maxlen=_MAX_DROPS)

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing, and nobody has said anything about it that would have to be remembered."""
        return not self.root.children and self.quota_pages is None

    def count(self, other: Namespace) -> None:
        """Add the sizes and counters of another namespace to the own ones."""
        self.num_tokens += other.num_tokens
        self.num_pages += other.num_pages
        self.query_tokens += other.query_tokens
        self.hit_tokens += other.hit_tokens
        for reason, num_tokens in other.dropped_tokens.items():
            self.dropped_tokens[reason] += num_tokens


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


class Node:
    """Tokens [start, end) of a path, and the pages that overlap them."""

    __slots__ = (
        "born_s",
        "children",
        "namespace",
        "num_pins",
        "pages",
        "parent",
        "rhythm",
        "rhythm_fully",
        "start",
        "tokens",
        "tombstones",
        "ttl_s",
        "used",
        "used_fully",
    )

    def __init__(
        self,
        namespace: Namespace,
        parent: Node | None,
        tokens: TokenIds,
        start: int,
        pages: PageIds,
        used: Use,
        ttl_s: float,
    ) -> None:
        self.namespace = namespace
        self.parent = parent
        self.children: dict[int, Node] = {}  # by first token
        self.tokens = tokens
        self.start = start
        self.pages = pages
        self.born_s = used.at_s
        self.used = used  # the last use of any of its tokens
        self.used_fully = used  # the last use of all of them: what a split leaves to the lower half
        self.rhythm = Rhythm()  # how any of its tokens is visited
        self.rhythm_fully = self.rhythm  # how all of them are: what a split leaves to the lower half
        self.ttl_s = ttl_s
        self.num_pins = 0
        self.tombstones: dict[int, Tombstone] | None = None

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.tokens.size

    @property
    def is_root(self) -> bool:
        return self is self.namespace.root

    @property
    def is_evictable(self) -> bool:
        """A leaf that nobody has pinned; its ancestors are protected by having it as a child."""
        return not (self.children or self.num_pins) and self.parent is not None

    @property
    def expires_at_s(self) -> float:
        return self.used.at_s + self.ttl_s

    @property
    def num_shared_pages(self) -> int:
        """1 if the first page is also an ancestor's last one, else 0.

        Mostly the parent's. It is one further up if the parent has the tokens between on a page of somebody else.
        """
        above = self.parent
        while above is not None and above.pages.size:
            if above.pages[-1] == self.pages[0]:
                return 1
            if above.pages.size > 1:
                return 0  # it begins in an earlier page, and what is above it ends there
            above = above.parent
        return 0

    def bury(self, token: int, reason: MissReason, gone: Node | None = None) -> None:
        """Remember why no child begins with `token`, and the rhythm of `gone`; only the latest few are kept."""
        if self.tombstones is None:
            self.tombstones = {}
        self.tombstones.pop(token, None)
        if len(self.tombstones) >= _MAX_TOMBSTONES:
            del self.tombstones[next(iter(self.tombstones))]
        at_s, rhythm = (0.0, None) if gone is None else (gone.used.at_s, gone.rhythm)
        self.tombstones[token] = Tombstone(reason, at_s, rhythm)

    def miss_reason(self, token: int) -> MissReason:
        """Why no child begins with `token`."""
        stone = (self.tombstones or {}).get(token)
        return MissReason.NEW if stone is None else stone.reason

    def rhythm_below(self, matched: int, tokens: TokenIds, now_s: float) -> Rhythm:
        """The rhythm of what is to hang below the first `matched` of `tokens`, which end in this node.

        What came back after it had been dropped goes on as it was. What continues a path for less than its length goes
        on in that path's rhythm; more than that says nothing about it: many tasks may begin with one system prompt.
        """
        stone = (self.tombstones or {}).get(int(tokens[matched])) if matched == self.end else None
        if stone is not None and stone.rhythm is not None:
            return stone.rhythm.after(now_s - stone.used_at_s)
        return self.rhythm if 2 * matched >= tokens.size else Rhythm()

    def head_from(self, start: int) -> tuple[int, ...]:
        """The first few of its tokens from position `start` on."""
        return tuple(self.tokens[start - self.start :][:_HEAD_TOKENS].tolist())

    def path_tokens(self) -> TokenIds:
        """All tokens [0, end) of the path that ends with this node, a copy."""
        path = np.empty(self.end, dtype=np.int32)
        node: Node | None = self
        while node is not None:
            path[node.start : node.end] = node.tokens
            node = node.parent
        return path

    def path_pages(self, num_tokens: int, page_size: int) -> PageIds:
        """Pages of the first `num_tokens` of the path, which end inside or at the end of this node.

        Where two nodes cover one page index, the deeper one's page holds the tokens of both, so it wins.
        """
        filled = -(-num_tokens // page_size)
        pages = np.empty(filled, dtype=np.int32)
        node: Node | None = self
        while node is not None and filled:
            first = node.start // page_size
            if first < filled:
                pages[first:filled] = node.pages[: filled - first]
                filled = first
            node = node.parent
        return pages


def as_tokens(tokens: npt.ArrayLike) -> TokenIds:
    """Token ids as the tree has them: one row of int32. Raises ValueError where they are none."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be one row of integers, not {ids.dtype} of shape {ids.shape}")
    return np.ascontiguousarray(ids, dtype=np.int32)


def common_prefix(left: TokenIds, right: TokenIds) -> int:
    """Number of equal leading tokens.

    Compared in chunks of growing size: an early difference on a long edge costs one small comparison, and the
    many edges that match to their end cost few.
    """
    num_tokens = min(left.size, right.size)
    at, stop = 0, min(_FIRST_CHUNK, num_tokens)
    while at < stop:
        differs = left[at:stop] != right[at:stop]
        first = int(differs.argmax())  # 0 if there is none
        if differs[first]:
            return at + first
        at, stop = stop, min(stop + min(stop * 7, _LAST_CHUNK), num_tokens)
    return num_tokens


def descend(root: Node, tokens: TokenIds) -> tuple[Node, int]:
    """Follow `tokens` down from `root`: the deepest node that shares a token, and how many match in all.

    That node may be matched in part; it is the root if nothing matches.
    """
    node, matched = root, 0
    while matched < tokens.size:
        child = node.children.get(int(tokens[matched]))
        if child is None:
            break
        node, matched = child, matched + common_prefix(child.tokens, tokens[matched:])
        if matched < node.end:
            break
    return node, matched


def preorder(root: Node) -> Iterator[Node]:
    """All nodes below `root`, parents before their children."""
    waiting = list(root.children.values())
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children.values())
