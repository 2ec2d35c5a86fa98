"""The radix tree: which token paths of which namespace have exact KV, and on which pages.

Owns the nodes and one page reference per node and page. Edges are token strings of any length: paths split at
any token, also inside a page, and a hit compares every token. There is one root per namespace and no way
between them. Always holds: the pages of a match hold exactly the matched tokens' KV, as long as writers copy
every page they do not hold alone. Refuses to know where KV comes from; approximate KV must never be inserted.
Not thread-safe: its owner serializes the calls, which is asserted in each, see `lock_rule`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcomm.memory.ages import PageAges
from kvcomm.memory.events import MAX_EVENTS, CacheEvent, EventKind, EventLog
from kvcomm.memory.eviction import DEFAULT_ORDER, Reaper
from kvcomm.memory.lock_rule import NOT_HELD, IsHeld, unshared
from kvcomm.memory.node import (
    NO_IDS,
    Drop,
    MissReason,
    Namespaces,
    NamespaceUsage,
    Node,
    TokenIds,
    Use,
    as_tokens,
    descend,
    preorder,
)
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.rhythm import Rhythm

__all__ = ["Drop", "Match", "MissReason", "NamespaceUsage", "NodeView", "RadixTree"]


class Match(NamedTuple):
    """The longest cached prefix: ceil(num_tokens / page_size) pages, *not* retained for the caller."""

    num_tokens: int
    pages: PageIds
    reason: MissReason | None  # why matching stopped; None if everything matched


class NodeView(NamedTuple):
    """A node as others may see it: tokens [start, end) of a path, at `depth` below the root (1 = top)."""

    depth: int
    start: int
    end: int
    tokens: TokenIds  # read-only, [end - start]
    num_pages: int
    num_children: int
    pinned: bool
    idle_s: float  # since the last use
    expires_in_s: float  # unless it is used before; infinite: never


class RadixTree:
    """Longest-prefix cache of exact KV pages.

    `ttl_s` is how long an unused path lives unless `insert` says otherwise; None is forever. `clock` gives
    seconds. `max_events` wait for `take_events`; then the oldest are lost. `eviction` names the policy by which leaves
    go, one of `kvcomm.memory.eviction.ORDERS`; ValueError for another name. `is_held` says whether who calls may.

    Attributes:
        ages: how long pages lived and lay unused, of all namespaces together.
        has_lifetimes: whether any path may expire: else nobody need look for those that have.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        clock: Callable[[], float] = time.monotonic,
        ttl_s: float | None = None,
        max_events: int = MAX_EVENTS,
        eviction: str = DEFAULT_ORDER,
        is_held: IsHeld = unshared,
    ) -> None:
        self._is_held = is_held
        self._pool = pool
        self._clock = clock
        self._ttl_s = math.inf if ttl_s is None else ttl_s
        self.has_lifetimes = ttl_s is not None
        self._namespaces = Namespaces()
        self._log = EventLog(max_events)
        self.ages = PageAges()
        self._reaper = Reaper(pool, self._log, self.ages, clock, eviction)
        self._num_uses = 0
        self._num_pins = 0  # of all nodes

    def match(self, namespace: str, tokens: npt.ArrayLike) -> Match:
        """The longest cached prefix of `tokens` in `namespace`.

        Refreshes the path for eviction and TTL and drops what has expired; splits nothing. A node matched in part
        is refreshed as a whole until it is split; then its unmatched rest goes back to its own last use.
        """
        assert self._is_held(), NOT_HELD
        ids = as_tokens(tokens)
        if self.has_lifetimes:
            self.expire()
        space = self._namespaces.enter(namespace)
        node, matched = descend(space.root, ids)
        if matched:
            self._visit(node, matched)
        self._touch(node, matched)
        space.query_tokens += ids.size
        space.hit_tokens += matched
        return self._found(node, matched, ids)

    def peek(self, namespace: str, tokens: npt.ArrayLike) -> int:
        """How many leading tokens are cached. Counts as no use: neither eviction nor TTL nor counters change."""
        return self.look(namespace, tokens).num_tokens

    def look(self, namespace: str, tokens: npt.ArrayLike) -> Match:
        """What `match` would find. Counts as no use, as `peek`."""
        assert self._is_held(), NOT_HELD
        if self.has_lifetimes:
            self.expire()
        ids = as_tokens(tokens)
        node, matched = descend(self._namespaces.look(namespace).root, ids)
        return self._found(node, matched, ids)

    def insert(self, namespace: str, tokens: npt.ArrayLike, pages: PageIds, *, ttl_s: float | None = None) -> int:
        """Make `tokens` with their KV on `pages` matchable; returns how many tokens were new.

        `pages` are the ceil(num_tokens / page_size) pages from position 0; the caller keeps its own
        references, the tree adds one for each page it newly refers to. What is cached already keeps the
        tree's old pages. A longer `ttl_s` (default: the tree's) also prolongs the path above. Over quota, the
        namespace's own paths go first; then only as many leading tokens are stored as fit.

        Raises:
            ValueError: `pages` has another length.
        """
        assert self._is_held(), NOT_HELD
        ids = as_tokens(tokens)
        num_pages = -(-ids.size // self._pool.page_size)
        if pages.size != num_pages:
            raise ValueError(f"{ids.size} tokens need {num_pages} pages of {self._pool.page_size}, not {pages.size}")
        if self.has_lifetimes:
            self.expire()
        self.has_lifetimes |= ttl_s is not None
        ttl = self._ttl_s if ttl_s is None else ttl_s
        node, matched = descend(self._namespaces.enter(namespace).root, ids)
        rhythm = node.rhythm_below(matched, ids, self._clock()) if matched < ids.size else node.rhythm
        self._touch(node, matched)
        end = self._make_room(node, matched, ids.size, pages)
        if matched < node.end and (end > matched or ttl > node.ttl_s):
            node = self._split(node, matched)
        self._prolong(node, ttl)
        if end > matched:
            node = self._attach(node, ids[:end], pages, ttl, rhythm)
        if end < ids.size and node.end == end:
            node.bury(int(ids[end]), MissReason.QUOTA)
        return end - matched

    def pin(self, namespace: str, tokens: npt.ArrayLike) -> int:
        """Keep what is cached of `tokens` from eviction, quota and TTL; returns how many tokens that is."""
        assert self._is_held(), NOT_HELD
        node, matched = descend(self._namespaces.enter(namespace).root, as_tokens(tokens))
        if not matched:
            return 0
        if matched < node.end:
            node = self._split(node, matched)
        node.num_pins += 1
        self._num_pins += 1
        return matched

    def unpin(self, namespace: str, tokens: npt.ArrayLike) -> int:
        """Undo one `pin` on the longest pinned prefix of `tokens`; returns its length, 0 if there is none."""
        assert self._is_held(), NOT_HELD
        node, matched = descend(self._namespaces.enter(namespace).root, as_tokens(tokens))
        while node.parent is not None and (node.end > matched or not node.num_pins):
            node = node.parent
        if node.is_root:
            return 0
        num_tokens = node.end
        node.num_pins -= 1
        self._num_pins -= 1
        self._reaper.track(node)
        if node.namespace.quota_pages is not None:  # maybe only the pin kept the namespace above it
            self._reaper.shrink(node.namespace, node.namespace.quota_pages)
        return num_tokens

    def set_quota(self, namespace: str, num_pages: int | None) -> None:
        """Limit the distinct pages of `namespace`; paths of its own go at once if it has more.

        Pinned paths may keep it above the limit until they are unpinned.

        Raises:
            ValueError: a negative limit.
        """
        assert self._is_held(), NOT_HELD
        if num_pages is not None and num_pages < 0:
            raise ValueError(f"a quota cannot be {num_pages} pages; use None for no limit")
        space = self._namespaces.enter(namespace)
        space.quota_pages = num_pages
        if num_pages is None:
            self._reaper.end_quota(space)
        else:
            self._reaper.start_quota(space)
            self._reaper.shrink(space, num_pages)

    def usage(self, namespace: str) -> NamespaceUsage:
        """Sizes and counters of `namespace`; all zero if it was never used, or is forgotten."""
        assert self._is_held(), NOT_HELD
        return self._namespaces.usage(namespace)

    def namespaces(self) -> tuple[str, ...]:
        """Namespaces that hold something or have a quota."""
        assert self._is_held(), NOT_HELD
        return self._namespaces.names()

    def total_usage(self) -> NamespaceUsage:
        """Sizes and counters over all namespaces, also over those that are forgotten; no quota."""
        assert self._is_held(), NOT_HELD
        return self._namespaces.total_usage()

    def evict(self, num_pages: int) -> int:
        """Drop leaves in the order of the policy until `num_pages` pages became free in the pool; returns how many.

        Leaves that are pinned stay, and those whose pages others hold too: dropping them frees nothing.
        """
        assert self._is_held(), NOT_HELD
        return self._reaper.evict(num_pages)

    def evict_all(self, num_pages: int) -> int:
        """As `evict`, but leaves whose pages others hold too go as well, since they keep their ancestors from going."""
        assert self._is_held(), NOT_HELD
        return self._reaper.evict(num_pages, spare_shared=False)

    def evictable_pages(self) -> Iterator[PageIds]:
        """Every page reference that eviction could drop: of nodes with nothing pinned below them."""
        assert self._is_held(), NOT_HELD
        for space in self._namespaces:
            if not self._num_pins:  # nearly always; whoever has seen enough need not look at the rest
                yield from (node.pages for node in preorder(space.root))
                continue
            kept: set[Node] = set()
            for node in reversed(list(preorder(space.root))):
                if node in kept or node.num_pins:
                    assert node.parent is not None
                    kept.add(node.parent)
                else:
                    yield node.pages

    def expire(self) -> int:
        """Drop what outlived its TTL; returns how many pages became free in the pool."""
        assert self._is_held(), NOT_HELD
        return self._reaper.expire(self._clock())

    def reset(self, namespace: str | None = None) -> None:
        """Drop everything in `namespace` (None: in all), pinned or not; quotas and counters stay."""
        assert self._is_held(), NOT_HELD
        for space in self._namespaces if namespace is None else [self._namespaces.look(namespace)]:
            self._num_pins -= sum(node.num_pins for node in preorder(space.root))
            self._reaper.clear(space)

    def recent_drops(self, namespace: str) -> list[tuple[float, Drop]]:
        """What left `namespace` lately, the latest few, newest first; with the seconds since then."""
        assert self._is_held(), NOT_HELD
        now_s = self._clock()
        return [(now_s - drop.at_s, drop) for drop in reversed(self._namespaces.look(namespace).drops)]

    def take_events(self) -> list[CacheEvent]:
        """Events since the last call, oldest first; the first call starts recording and returns none."""
        assert self._is_held(), NOT_HELD
        return self._log.take()

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would return any; may be asked for without a lock."""
        return not self._log.is_empty

    def all_stored(self) -> list[CacheEvent]:
        """Everything there is, as if it came just now, prefixes first: where a reader begins, or begins again."""
        assert self._is_held(), NOT_HELD
        return [
            CacheEvent(EventKind.STORED, space.name, node.start, node.path_tokens())
            for space in self._namespaces
            for node in preorder(space.root)
        ]

    def pages_held(self) -> Iterable[PageIds]:
        """Every page reference of the tree, for `PagePool.check_integrity`."""
        assert self._is_held(), NOT_HELD
        for space in self._namespaces:
            for node in preorder(space.root):
                yield node.pages

    def walk(self, namespace: str) -> Iterator[NodeView]:
        """All nodes of `namespace`, parents before children; do not change the tree meanwhile."""
        assert self._is_held(), NOT_HELD
        space = self._namespaces.look(namespace)
        now, depths = self._clock(), {space.root: 0}
        for node in preorder(space.root):
            assert node.parent is not None
            depths[node] = depths[node.parent] + 1
            tokens = node.tokens.view()
            tokens.flags.writeable = False
            yield NodeView(
                depths[node],
                node.start,
                node.end,
                tokens,
                node.pages.size,
                len(node.children),
                node.num_pins > 0,
                now - node.used.at_s,
                math.inf if node.num_pins else node.expires_at_s - now,
            )

    def check_integrity(self) -> None:
        """Prove structure, counters and queues.

        Raises:
            AssertionError: naming node and numbers.
        """
        assert self._is_held(), NOT_HELD
        num_pins = 0
        for space in self._namespaces:
            nodes = list(preorder(space.root))
            for node in nodes:
                self._check_node(node)
                num_pins += node.num_pins
            num_tokens = sum(node.tokens.size for node in nodes)
            assert num_tokens == space.num_tokens, f"{space.name!r}: {num_tokens} tokens, not {space.num_tokens}"
            num_pages = np.unique(np.concatenate([NO_IDS, *(node.pages for node in nodes)])).size
            assert num_pages == space.num_pages, f"{space.name!r}: {num_pages} pages, not {space.num_pages}"
        assert num_pins == self._num_pins, f"{num_pins} pins, not {self._num_pins}"

    def _check_node(self, node: Node) -> None:
        parent, page_size = node.parent, self._pool.page_size
        where = f"node [{node.start}, {node.end}) of {node.namespace.name!r}"
        assert parent is not None, f"{where} has no parent"
        assert node.tokens.size > 0, f"{where} is empty"
        assert parent.children[int(node.tokens[0])] is node, f"{where} hangs below another token"
        assert parent.end == node.start, f"{where} hangs below a node that ends at {parent.end}"
        num_pages = -(-node.end // page_size) - node.start // page_size
        assert node.pages.size == num_pages, f"{where} has {node.pages.size} pages, not {num_pages}"
        assert self._pool.refcounts(node.pages).min() > 0, f"{where} refers to free pages {node.pages}"
        assert node.num_pins >= 0, f"{where}: {node.num_pins} pins"
        if not parent.is_root:
            assert node.used <= parent.used, f"{where} used at {node.used}, its parent at {parent.used}"
            assert node.ttl_s <= parent.ttl_s, f"{where} lives {node.ttl_s} s, its parent {parent.ttl_s} s"
        if node.is_evictable:
            self._reaper.check_waiting(node)

    def _found(self, node: Node, matched: int, ids: TokenIds) -> Match:
        reason = None
        if matched < ids.size:
            reason = node.miss_reason(int(ids[matched])) if matched == node.end else MissReason.NEW
        return Match(matched, node.path_pages(matched, self._pool.page_size), reason)

    def _visit(self, node: Node, matched: int) -> None:
        """Note the visit of the path of `matched` tokens down to `node`, before it is used again.

        Counts the pages that are found: one in which one node ends and the next begins counts with the first.
        """
        now_s, page_size = self._clock(), self._pool.page_size
        at: Node | None = node
        used, before, after = None, node.rhythm, node.rhythm
        while at is not None:
            gap_s = now_s - at.used.at_s
            num_pages = -(-min(at.end, matched) // page_size) - -(-at.start // page_size)
            self.ages.reuse_gap.add(gap_s, num_pages)
            if at.used is not used or at.rhythm is not before:  # nodes of one path mostly agree
                used, before, after = at.used, at.rhythm, at.rhythm.after(gap_s)
            at.rhythm = after
            if at.end <= matched:
                at.rhythm_fully = after
            at = at.parent

    def _touch(self, node: Node, matched: int) -> None:
        """Mark the path of `matched` tokens down to `node` as used now."""
        self._num_uses += 1
        use = Use(self._num_uses, self._clock())
        at: Node | None = node
        while at is not None:
            at.used = use
            if at.end <= matched:
                at.used_fully = use
            at = at.parent

    def _prolong(self, node: Node, ttl_s: float) -> None:
        """Let `node` and its ancestors live at least `ttl_s` from their last use."""
        at: Node | None = node
        while at is not None and at.ttl_s < ttl_s:
            at.ttl_s = ttl_s
            at = at.parent

    def _make_room(self, node: Node, matched: int, num_tokens: int, pages: PageIds) -> int:
        """Make room under the quota for tokens [matched, num_tokens); returns the end of those that fit."""
        space, page_size = node.namespace, self._pool.page_size
        if space.quota_pages is None or matched == num_tokens:
            return num_tokens
        first = matched // page_size
        above = node.path_pages(matched, page_size)
        shared = int(matched % page_size > 0 and above[-1] == pages[first])
        wanted = pages.size - first - shared
        node.num_pins += 1  # else room for the rest of a path would be made by dropping its beginning
        self._reaper.shrink(space, max(space.quota_pages - wanted, 0))
        node.num_pins -= 1
        self._reaper.track(node)
        fits = min(wanted, max(space.quota_pages - space.num_pages, 0))
        return max(matched, min(num_tokens, (first + shared + fits) * page_size))

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` at position `at`; returns the new upper half. The lower half stays the same object.

        So its pins, which protect ancestors too, go on protecting both halves.
        """
        parent, page_size = node.parent, self._pool.page_size
        assert parent is not None, "a root cannot be split"
        size, first = at - node.start, node.start // page_size
        upper_pages = node.pages[: -(-at // page_size) - first].copy()
        lower_pages = node.pages[at // page_size - first :].copy()
        if at % page_size:
            self._pool.retain(lower_pages[:1])
        upper = Node(node.namespace, parent, node.tokens[:size].copy(), node.start, upper_pages, node.used, node.ttl_s)
        upper.born_s, upper.rhythm, upper.rhythm_fully = node.born_s, node.rhythm, node.rhythm
        parent.children[int(node.tokens[0])] = upper
        upper.children[int(node.tokens[size])] = node
        node.parent, node.start, node.tokens, node.pages = upper, at, node.tokens[size:].copy(), lower_pages
        node.used, node.rhythm = node.used_fully, node.rhythm_fully
        self._reaper.track(node)
        return upper

    def _attach(self, parent: Node, ids: TokenIds, pages: PageIds, ttl_s: float, rhythm: Rhythm) -> Node:
        """Hang the rest of `ids` below `parent`, with those of `pages` that overlap it."""
        start, page_size = parent.end, self._pool.page_size
        own = pages[start // page_size : -(-ids.size // page_size)].astype(np.int32)
        leaf = Node(parent.namespace, parent, ids[start:].copy(), start, own, parent.used, ttl_s)
        leaf.rhythm = leaf.rhythm_fully = rhythm
        self._pool.retain(own)
        parent.children[int(ids[start])] = leaf
        parent.namespace.num_tokens += leaf.tokens.size
        parent.namespace.num_pages += own.size - leaf.num_shared_pages
        self._reaper.track(leaf)
        self._reaper.record(EventKind.STORED, leaf, start)
        return leaf
