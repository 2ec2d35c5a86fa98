"""Pool and tree together, in any order of operations, against a naive model: the set of all cached prefixes.

Where the model can know the outcome (match, insert without quota, pin, reset) it must be met exactly;
where the tree may choose (evict, expire, quota) the outcome must be allowed: nothing protected or young is
lost, nothing appears.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcomm.config import EVICTION_POLICIES
from kvcomm.errors import PoolExhausted
from kvcomm.memory.tree import Match, MissReason, RadixTree
from tests.memory.kv_model import MarkedPool, MarkedSequence, Path

NAMESPACES = ("left", "right")
Prefix = tuple[str, Path]

paths = st.lists(st.integers(0, 2), max_size=11).map(tuple)
namespaces = st.sampled_from(NAMESPACES)
ttls = st.none() | st.sampled_from([1.0, 5.0, math.inf])


def prefixes(namespace: str, path: Path) -> set[Prefix]:
    return {(namespace, path[: i + 1]) for i in range(len(path))}


class TreeMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(4, 24),
        page_size=st.integers(1, 4),
        ttl_s=st.none() | st.just(3.0),
        eviction=st.sampled_from(EVICTION_POLICIES),
    )
    def create(self, num_pages: int, page_size: int, ttl_s: float | None, eviction: str) -> None:
        self.now = 0.0
        self.marked = MarkedPool(num_pages, page_size)
        self.pool = self.marked.pool
        self.tree = RadixTree(self.pool, clock=lambda: self.now, ttl_s=ttl_s, eviction=eviction)
        self.ttl_s = math.inf if ttl_s is None else ttl_s
        self.cached: set[Prefix] = set()
        self.life: dict[Prefix, tuple[float, float]] = {}  # last use, time to live
        self.gone: dict[Prefix, set[MissReason]] = defaultdict(set)
        self.sequences: list[MarkedSequence] = []
        self.pins: list[Prefix] = []
        self.quotas: dict[str, int | None] = dict.fromkeys(NAMESPACES)
        self.queries = dict.fromkeys(NAMESPACES, (0, 0))

    # What the tree holds, read through its views only.

    def actual(self) -> set[Prefix]:
        found: set[Prefix] = set()
        for namespace in NAMESPACES:
            path: Path = ()
            for node in self.tree.walk(namespace):
                path = path[: node.start] + tuple(node.tokens.tolist())
                assert len(path) == node.end
                found |= {(namespace, path[:n]) for n in range(node.start + 1, node.end + 1)}
        return found

    def protected(self) -> set[Prefix]:
        return set().union(*(prefixes(*prefix) for prefix in self.pins))

    def lost(self, reason: MissReason, namespace: str | None = None) -> set[Prefix]:
        """Accept what the tree dropped, if it was allowed to, and return it."""
        actual = self.actual()
        assert actual <= self.cached, "tokens appeared from nowhere"
        assert self.protected() <= actual, "a pinned path lost tokens"
        lost = self.cached - actual
        assert namespace is None or {name for name, _ in lost} <= {namespace}
        for prefix in lost:
            self.gone[prefix].add(reason)
        self.cached = actual
        return lost

    def settle(self) -> None:
        """Let everything due expire now, so that the next operation finds a tree the model knows."""
        free = self.pool.num_free
        assert self.tree.expire() == self.pool.num_free - free
        for prefix in self.lost(MissReason.EXPIRED):
            used, ttl = self.life[prefix]
            assert used + ttl <= self.now, f"{prefix} was used at {used}, lives {ttl} s and is gone at {self.now}"

    def use(self, namespace: str, path: Path, ttl_s: float | None = None) -> None:
        for prefix in prefixes(namespace, path):
            _, ttl = self.life.get(prefix, (0.0, 0.0)) if prefix in self.cached else (0.0, 0.0)
            self.life[prefix] = (self.now, max(ttl, 0.0 if ttl_s is None else ttl_s))

    def longest(self, namespace: str, path: Path) -> int:
        return sum(prefix in self.cached for prefix in prefixes(namespace, path))

    def match(self, namespace: str, path: Path) -> Match:
        self.settle()
        expected = self.longest(namespace, path)
        assert self.tree.peek(namespace, np.array(path, dtype=np.int32)) == expected
        match = self.tree.match(namespace, np.array(path, dtype=np.int64))
        assert match.num_tokens == expected
        self.marked.check(namespace, path[:expected], match.pages)
        if expected == len(path):
            assert match.reason is None
        else:
            assert match.reason in {MissReason.NEW} | self.gone[(namespace, path[: expected + 1])]
        self.use(namespace, path[:expected])
        asked, hit = self.queries[namespace]
        self.queries[namespace] = (asked + len(path), hit + expected)
        return match

    # Operations.

    @rule(namespace=namespaces, path=paths)
    def look_up(self, namespace: str, path: Path) -> None:
        self.match(namespace, path)

    @rule(namespace=namespaces, path=paths, store=st.booleans(), ttl_s=ttls)
    def start(self, namespace: str, path: Path, store: bool, ttl_s: float | None) -> None:
        """What a request does: match, hold, make room, compute the rest, maybe insert."""
        match = self.match(namespace, path)
        sequence = MarkedSequence(self.marked, namespace)
        sequence.adopt(path[: match.num_tokens], match.pages)
        self.sequences.append(sequence)
        self.grow(sequence, path[match.num_tokens :])
        if store:
            self.insert(sequence, len(sequence.path), ttl_s)

    def grow(self, sequence: MarkedSequence, tail: Path) -> None:
        needed = len(tail) // self.pool.page_size + 2
        if self.pool.num_free < needed:
            self.evict(needed - self.pool.num_free)
        if self.pool.num_free >= needed:
            sequence.extend(tail)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tail=paths)
    def extend(self, data: st.DataObject, tail: Path) -> None:
        self.grow(data.draw(st.sampled_from(self.sequences)), tail)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        copied = self.pool.bytes_copied
        self.sequences.append(data.draw(st.sampled_from(self.sequences)).fork())
        assert self.pool.bytes_copied == copied

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), ttl_s=ttls)
    def store(self, data: st.DataObject, ttl_s: float | None) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.insert(sequence, data.draw(st.integers(0, len(sequence.path))), ttl_s)

    def insert(self, sequence: MarkedSequence, num_tokens: int, ttl_s: float | None) -> None:
        self.settle()
        namespace, path = sequence.namespace, sequence.path[:num_tokens]
        known = self.longest(namespace, path)
        quota, used = self.quotas[namespace], self.tree.usage(namespace).num_pages
        new = self.tree.insert(namespace, path, sequence.pages_for(num_tokens), ttl_s=ttl_s)
        stored = path[: known + new]
        wanted = -(-num_tokens // self.pool.page_size) - known // self.pool.page_size
        if quota is None or used + wanted <= quota:
            assert stored == path
        assert 0 <= new <= num_tokens - known
        self.use(namespace, stored, self.ttl_s if ttl_s is None else ttl_s)
        self.cached |= prefixes(namespace, stored)
        if stored != path:
            self.gone[(namespace, path[: len(stored) + 1])].add(MissReason.QUOTA)
        lost = self.lost(MissReason.QUOTA, namespace)
        assert not lost & prefixes(namespace, stored), "an insertion dropped its own path"
        assert quota is not None or not lost

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))).release()

    @rule(namespace=namespaces, path=paths)
    def pin(self, namespace: str, path: Path) -> None:
        self.settle()
        num_tokens = self.tree.pin(namespace, path)
        assert num_tokens == self.longest(namespace, path)
        if num_tokens:
            self.pins.append((namespace, path[:num_tokens]))

    @rule(namespace=namespaces, path=paths)
    def unpin(self, namespace: str, path: Path) -> None:
        covered = [pin for pin in self.pins if pin in prefixes(namespace, path)]
        deepest = max(covered, key=lambda pin: len(pin[1]), default=None)
        assert self.tree.unpin(namespace, path) == (len(deepest[1]) if deepest else 0)
        if deepest:
            self.pins.remove(deepest)
            # A namespace above its quota shrinks as soon as protection ends.
            assert not self.lost(MissReason.QUOTA, namespace) or self.quotas[namespace] is not None

    @rule(num_pages=st.integers(0, 12))
    def evict(self, num_pages: int) -> None:
        self.settle()
        free = self.pool.num_free
        freed = self.tree.evict(num_pages)
        assert freed == self.pool.num_free - free
        lost = self.lost(MissReason.EVICTED)
        assert num_pages or not lost
        if freed < num_pages:
            self.check_nothing_evictable_left()

    def check_nothing_evictable_left(self) -> None:
        """Whatever the tree alone still holds lies on a protected path, or above pages others hold."""
        held_elsewhere = {p for s in self.sequences for p in s.pages.tolist()}
        for namespace in NAMESPACES:
            for node in self.tree.walk(namespace):
                if node.num_children or node.pinned:
                    continue
                match = self.tree.match(namespace, self.path_to(namespace, node.start, node.tokens.tolist()))
                self.queries[namespace] = tuple(
                    np.add(self.queries[namespace], (match.num_tokens, match.num_tokens)).tolist()
                )
                assert held_elsewhere & set(match.pages.tolist()), f"{node} could have been evicted"

    def path_to(self, namespace: str, start: int, tokens: list[int]) -> Path:
        fits = [p for name, p in self.cached if name == namespace and len(p) == start + len(tokens)]
        return next(p for p in fits if list(p[start:]) == tokens)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        self.settle()

    @rule(namespace=namespaces, num_pages=st.none() | st.integers(0, 12))
    def set_quota(self, namespace: str, num_pages: int | None) -> None:
        self.settle()
        before = self.tree.usage(namespace).num_pages
        free = self.pool.num_free
        self.tree.set_quota(namespace, num_pages)
        assert self.pool.num_free >= free
        self.quotas[namespace] = num_pages
        lost = self.lost(MissReason.QUOTA, namespace)
        assert not lost or (num_pages is not None and before > num_pages)

    @rule(namespace=st.none() | namespaces)
    def reset(self, namespace: str | None) -> None:
        self.settle()
        names = NAMESPACES if namespace is None else (namespace,)
        self.pins = [pin for pin in self.pins if pin[0] not in names]
        self.tree.reset(namespace)
        self.cached = {prefix for prefix in self.cached if prefix[0] not in names}
        assert self.actual() == self.cached

    @rule(namespace=namespaces, path=paths.filter(bool))
    def reject_wrong_page_tables(self, namespace: str, path: Path) -> None:
        with pytest.raises(ValueError, match="need"):
            self.tree.insert(namespace, path, np.empty(0, dtype=np.int32))

    @rule()
    def overdraw(self) -> None:
        with pytest.raises(PoolExhausted):
            self.pool.allocate(self.pool.num_free + 1)

    @invariant()
    def nothing_leaked_or_mixed_up(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check_integrity()
        self.pool.check_integrity(held=[*self.tree.pages_held(), *(s.pages for s in self.sequences)])
        assert self.actual() == self.cached
        for sequence in self.sequences:
            self.marked.check(sequence.namespace, sequence.path, sequence.pages)

    @invariant()
    def counters_agree(self) -> None:
        if not hasattr(self, "tree"):
            return
        for namespace in NAMESPACES:
            usage = self.tree.usage(namespace)
            assert usage.num_tokens == sum(name == namespace for name, _ in self.cached)
            assert (usage.query_tokens, usage.hit_tokens) == self.queries[namespace]
            quota = self.quotas[namespace]
            assert usage.quota_pages == quota
            if quota is not None and usage.num_pages > quota:
                assert any(prefix[0] == namespace for prefix in self.protected()), "over quota for no reason"

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for sequence in self.sequences:
            sequence.release()
        self.tree.reset()
        self.tree.check_integrity()
        self.pool.check_integrity(held=[])
        assert self.pool.allocate(self.pool.num_pages).tolist() == list(range(self.pool.num_pages))


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
