"""Sequences: what each of them reads back is what was written for its own tokens, whoever else shares the pages.

The state machine compares with a plain list of values per sequence. Every write puts a number never used before into
the slots, so a page that is shared too long, copied too little or given back too early shows in somebody's content.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvcomm.errors import PoolExhausted, PoolTooSmall
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.pool import LayerShape, PagePool
from kvcomm.memory.sequences import KVSequence

PAGE_SIZE = 4
numbers = itertools.count(1)


def make_pool(num_pages: int = 8) -> PagePool:
    pool = PagePool([LayerShape(1, 1, 1)] * 2, num_pages=num_pages, page_size=PAGE_SIZE)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(float("nan"))
    return pool


def slots(sequence: KVSequence, start: int, end: int) -> np.ndarray:
    positions = np.arange(start, end)
    return sequence.pages[positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE


def write(pool: PagePool, sequence: KVSequence, start: int, end: int) -> list[float]:
    """Compute [start, end) as a runner would; only legal on pages nobody shares. Returns the new values."""
    at = slots(sequence, start, end)
    pages = np.unique(at // PAGE_SIZE).astype(np.int32)
    assert (pool.refcounts(pages) == 1).all(), f"about to write shared pages among {pages.tolist()}"
    values = [float(next(numbers) % 900_000) for _ in range(end - start)]
    for layer, (keys, stored) in enumerate(zip(pool.keys, pool.values, strict=True)):
        for slot, value in zip(at.tolist(), values, strict=True):
            keys[slot], stored[slot] = value + layer * 1e6, -value - layer * 1e6
    return values


def content(pool: PagePool, sequence: KVSequence) -> list[float]:
    """The values of the computed positions; every layer's keys and values must agree on them."""
    at = slots(sequence, 0, sequence.num_computed)
    values = pool.keys[0][at].flatten().tolist()
    for layer, (keys, stored) in enumerate(zip(pool.keys, pool.values, strict=True)):
        assert keys[at].flatten().tolist() == [value + layer * 1e6 for value in values]
        assert stored[at].flatten().tolist() == [-value - layer * 1e6 for value in values]
    return values


def compute(pool: PagePool, sequence: KVSequence, num_tokens: int) -> list[float]:
    """Append tokens and compute everything that is not."""
    sequence.append(range(num_tokens))
    start, end = sequence.num_computed, sequence.num_tokens
    sequence.make_writable(start, end)
    values = write(pool, sequence, start, end)
    sequence.num_computed = end
    return values


class SequenceMachine(RuleBasedStateMachine):
    """Sequences over one small pool, against lists of tokens and values."""

    sequences: Bundle[KVSequence] = Bundle("sequences")
    NUM_PAGES: ClassVar[int] = 12

    @initialize(target=sequences)
    def start(self) -> KVSequence:
        self.pool = make_pool(self.NUM_PAGES)
        self.tokens: dict[KVSequence, list[int]] = {}
        self.values: dict[KVSequence, list[float]] = {}
        return self.create([1, 2, 3])

    @rule(target=sequences, token_ids=st.lists(st.integers(0, 50), max_size=90))
    def create(self, token_ids: list[int]) -> KVSequence:
        sequence = KVSequence(self.pool, token_ids)
        self.tokens[sequence], self.values[sequence] = list(token_ids), []
        return sequence

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: KVSequence) -> KVSequence:
        bytes_copied, num_free = self.pool.bytes_copied, self.pool.num_free
        child = parent.fork()
        assert (self.pool.bytes_copied, self.pool.num_free) == (bytes_copied, num_free)
        self.tokens[child], self.values[child] = list(self.tokens[parent]), list(self.values[parent])
        return child

    @rule(sequence=sequences, token_ids=st.lists(st.integers(0, 50), max_size=10))
    def append(self, sequence: KVSequence, token_ids: list[int]) -> None:
        sequence.append(token_ids)
        self.tokens[sequence] += token_ids

    @rule(sequence=sequences, num_tokens=st.integers(1, 10), reserve=st.sampled_from([0, 0, 3, 9]))
    def compute(self, sequence: KVSequence, num_tokens: int, reserve: int) -> None:
        """Compute the next tokens, perhaps with pages reserved for more; a full pool must change nothing."""
        start = sequence.num_computed
        end = min(start + num_tokens, sequence.num_tokens)
        if end == start:
            return
        missing = sequence.num_missing_pages(end + reserve)
        try:
            sequence.make_writable(start, end + reserve)
        except PoolExhausted:
            assert missing > self.pool.num_free
            return
        assert sequence.num_missing_pages(end + reserve) == 0
        self.values[sequence] = self.values[sequence][:start] + write(self.pool, sequence, start, end)
        sequence.num_computed = end

    @rule(sequence=sequences, data=st.data())
    def recompute(self, sequence: KVSequence, data: st.DataObject) -> None:
        """Compute a part in the middle anew; the rest of its pages must survive a copy."""
        if not sequence.num_computed:
            return
        start = data.draw(st.integers(0, sequence.num_computed - 1))
        end = data.draw(st.integers(start + 1, sequence.num_computed))
        try:
            sequence.make_writable(start, end)
        except PoolExhausted:
            return
        self.values[sequence][start:end] = write(self.pool, sequence, start, end)

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence: KVSequence, data: st.DataObject) -> None:
        num_tokens = data.draw(st.integers(0, sequence.num_tokens))
        sequence.truncate(num_tokens)
        del self.tokens[sequence][num_tokens:], self.values[sequence][num_tokens:]

    @rule(sequence=sequences, num_computed=st.integers(0, 20))
    def rewind(self, sequence: KVSequence, num_computed: int) -> None:
        """An engine computes the last token again when it needs its logits."""
        sequence.num_computed = min(num_computed, sequence.num_computed)
        del self.values[sequence][sequence.num_computed :]

    @rule(sequence=sequences)
    def trim(self, sequence: KVSequence) -> None:
        sequence.trim()
        assert sequence.num_pages == -(-sequence.num_computed // PAGE_SIZE)

    @rule(target=sequences, source=sequences, data=st.data())
    def adopt(self, source: KVSequence, data: st.DataObject) -> KVSequence:
        """A sequence that begins like the source takes over more of its computed prefix, as from the tree."""
        num_computed = data.draw(st.integers(0, source.num_computed))
        num_own = data.draw(st.sampled_from([0, num_computed // 2, num_computed]))
        sequence = KVSequence(self.pool, source.token_ids)
        self.tokens[sequence], self.values[sequence] = list(self.tokens[source]), []
        if num_own and sequence.num_missing_pages(num_own + 3) <= self.pool.num_free:
            sequence.make_writable(0, num_own + 3)
            write(self.pool, sequence, 0, num_own)
            sequence.num_computed = num_own
        sequence.adopt(source.pages[: -(-num_computed // PAGE_SIZE)].copy(), num_computed)
        self.values[sequence] = self.values[source][:num_computed]
        return sequence

    @rule(sequence=sequences)
    def release(self, sequence: KVSequence) -> None:
        """A released sequence can be used again from nothing."""
        sequence.release()
        assert sequence.num_pages == 0
        self.values[sequence] = []

    @rule(target=sequences, sequence=consumes(sequences))
    def forget(self, sequence: KVSequence) -> object:
        sequence.release()
        del self.tokens[sequence], self.values[sequence]
        return multiple()

    @invariant()
    def everybody_reads_their_own_values(self) -> None:
        for sequence, values in self.values.items():
            sequence.check_integrity()
            assert sequence.token_ids.tolist() == self.tokens[sequence]
            assert sequence.num_computed == len(values)
            assert content(self.pool, sequence) == values
        self.pool.check_integrity([sequence.pages for sequence in self.values])

    def teardown(self) -> None:
        for sequence in self.values:
            sequence.release()
        assert self.pool.num_free == self.NUM_PAGES


TestSequences = SequenceMachine.TestCase
TestSequences.settings = settings(max_examples=80, stateful_step_count=40)


def test_a_fork_copies_nothing_until_someone_writes() -> None:
    pool = make_pool()
    parent = KVSequence(pool)
    values = compute(pool, parent, 6)
    child = parent.fork()
    assert child.pages.tolist() == parent.pages.tolist()
    assert (pool.bytes_copied, pool.num_free) == (0, 6)
    own = compute(pool, child, 1)
    assert child.pages[0] == parent.pages[0]
    assert child.pages[1] != parent.pages[1]
    assert pool.bytes_copied == 2 * pool.page_bytes // PAGE_SIZE  # the two tokens of the page that were computed
    assert (content(pool, parent), content(pool, child)) == (values, values + own)


def test_the_last_writer_of_a_page_does_not_copy_it() -> None:
    pool = make_pool()
    parent = KVSequence(pool)
    compute(pool, parent, 6)
    child = parent.fork()
    parent.release()
    pages = child.pages.tolist()
    compute(pool, child, 1)
    assert (child.pages.tolist(), pool.bytes_copied) == (pages, 0)


def test_forks_share_computed_pages_only_and_inherit_the_fidelity() -> None:
    pool = make_pool()
    parent = KVSequence(pool, range(10))
    parent.make_writable(0, 20)
    write(pool, parent, 0, 5)
    parent.num_computed = 5
    parent.mark_approximate(3)
    child = parent.fork()
    assert (parent.num_pages, child.num_pages) == (5, 2)
    assert (child.num_tokens, child.num_computed, child.fidelity) == (10, 5, Fidelity.APPROXIMATE)
    assert KVSequence(pool).fidelity is Fidelity.EXACT


def test_a_child_does_not_see_its_parents_future() -> None:
    pool = make_pool()
    parent = KVSequence(pool, [1, 2])
    child = parent.fork()
    parent.append([3])
    child.append([7, 8])
    parent.truncate(1)
    parent.append([9])
    assert (parent.token_ids.tolist(), child.token_ids.tolist()) == ([1, 9], [1, 2, 7, 8])


def test_new_pages_lie_behind_the_last_one() -> None:
    """Consecutive pages are read as a view."""
    pool = make_pool(32)
    first = KVSequence(pool)
    compute(pool, first, 30)
    first.release()
    second = KVSequence(pool)
    for _ in range(10):
        compute(pool, second, 3)
    assert (np.diff(second.pages) == 1).all()


def test_recomputation_of_a_shared_page_keeps_what_stands_behind_it() -> None:
    """Bug: only what stood before the recomputed part was copied; the tokens behind it became garbage."""
    pool = make_pool()
    parent = KVSequence(pool)
    values = compute(pool, parent, 4)
    child = parent.fork()
    child.make_writable(1, 2)
    (new,) = write(pool, child, 1, 2)
    assert content(pool, parent) == values
    assert content(pool, child) == [values[0], new, *values[2:]]


@pytest.mark.parametrize("num_free", [0, 1, 2])
def test_a_full_pool_leaves_every_sequence_usable(num_free: int) -> None:
    """Three pages would be needed: two copies and a new one. Bug: copies made before the failure lost content."""
    pool = make_pool(2 + num_free)
    parent = KVSequence(pool)
    values = compute(pool, parent, 8)
    child = parent.fork()
    child.append(range(4))
    assert child.num_missing_pages(12) == 1
    child.truncate(8)
    child.num_computed = 0
    child.append(range(4))
    assert child.num_missing_pages(12) == 3
    child.num_computed = 8
    with pytest.raises(PoolExhausted):
        child.make_writable(0, 12)
    assert (content(pool, parent), content(pool, child)) == (values, values)
    child.check_integrity()
    pool.check_integrity([parent.pages, child.pages])
    parent.release()
    if pool.num_free:
        assert len(compute(pool, child, 0)) == 4


def test_more_pages_than_the_pool_has_are_refused_by_their_own_name() -> None:
    pool = make_pool(2)
    sequence = KVSequence(pool, range(9))
    with pytest.raises(PoolTooSmall, match="3 pages of 4 tokens wanted, the whole pool has 2"):
        sequence.make_writable(0, 9)
    assert pool.num_free == 2


def test_release_twice_and_read_the_tokens_afterwards() -> None:
    pool = make_pool()
    sequence = KVSequence(pool)
    compute(pool, sequence, 5)
    sequence.release()
    sequence.release()
    assert (sequence.num_tokens, sequence.num_computed, sequence.num_pages) == (5, 0, 0)
    assert sequence.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert pool.num_free == pool.num_pages


def test_an_adopted_prefix_replaces_the_own_pages_it_covers() -> None:
    pool = make_pool()
    source, sequence = KVSequence(pool), KVSequence(pool, range(20))
    values = compute(pool, source, 10)
    sequence.make_writable(0, 20)
    write(pool, sequence, 0, 5)
    sequence.num_computed = 5
    own = sequence.pages.tolist()
    sequence.adopt(source.pages, 10)
    assert sequence.pages.tolist() == [*source.pages.tolist(), *own[3:]]
    assert content(pool, sequence) == values
    assert pool.refcounts(source.pages).tolist() == [2, 2, 2]
    pool.check_integrity([source.pages, sequence.pages])
    assert pool.num_free == 3


def test_many_tokens_are_kept_in_order() -> None:
    sequence = KVSequence(make_pool(), np.arange(200, dtype=np.int32))
    for first in range(200, 1000, 100):
        sequence.append(list(range(first, first + 100)))
    assert sequence.token_ids.tolist() == list(range(1000))


def test_truncate_and_adopt_refuse_to_go_out_of_bounds() -> None:
    pool = make_pool()
    sequence = KVSequence(pool)
    compute(pool, sequence, 5)
    other = KVSequence(pool, range(9))
    with pytest.raises(AssertionError, match=r"\(6, 5\)"):
        sequence.truncate(6)
    with pytest.raises(AssertionError, match=r"\(4, 5\)"):
        sequence.adopt(sequence.pages, 4)
    with pytest.raises(AssertionError, match=r"\(10, 9\)"):
        other.adopt(sequence.pages, 10)
    other.release()
    pool.check_integrity([sequence.pages])


def test_integrity_check_sees_a_table_that_is_too_short_or_holds_a_page_twice() -> None:
    pool = make_pool()
    sequence = KVSequence(pool)
    compute(pool, sequence, 5)
    pages = sequence.pages
    sequence._pages = pages[:1]
    with pytest.raises(AssertionError, match=r"\(1, 5\)"):
        sequence.check_integrity()
    sequence._pages = pages[[0, 0]]
    with pytest.raises(AssertionError, match="a page twice in"):
        sequence.check_integrity()
    sequence._pages = pages
    pool.release(pages[1:])
    with pytest.raises(AssertionError, match="a free page in"):
        sequence.check_integrity()
