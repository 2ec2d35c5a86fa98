"""The pool against a plain list of counts: runs, best fit, reference counts, copies, leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcomm.errors import PoolExhausted, PoolTooSmall
from kvcomm.memory.pool import LayerShape, PageIds, PagePool


def ids(*pages: int) -> PageIds:
    return np.array(pages, dtype=np.int32)


def bookkeeping(num_pages: int, page_size: int = 4) -> PagePool:
    return PagePool([], num_pages=num_pages, page_size=page_size)


def test_shapes_sizes_and_dtype() -> None:
    layers = [LayerShape(2, 8, 4), LayerShape(1, 6, 6)]
    pool = PagePool(layers, num_pages=3, page_size=4, dtype=torch.float16)
    assert [tuple(k.shape) for k in pool.keys] == [(12, 2, 8), (12, 1, 6)]
    assert [tuple(v.shape) for v in pool.values] == [(12, 2, 4), (12, 1, 6)]
    assert pool.keys[0].dtype == torch.float16
    stored = sum(t.numel() * t.element_size() for t in (*pool.keys, *pool.values))
    assert pool.page_bytes * pool.num_pages == stored


def test_whole_free_list_comes_back_by_id() -> None:
    pool = bookkeeping(8)
    first, second = pool.allocate(5), pool.allocate(3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(8))
    assert pool.num_free == 0
    assert pool.release(first) == 5
    assert pool.release(second) == 3
    assert pool.allocate(8).tolist() == list(range(8))


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    pool = bookkeeping(4)
    pages = pool.allocate(2)
    pool.retain(pages)
    pool.retain(pages[:1])
    assert pool.refcounts(pages).tolist() == [3, 2]
    assert pool.release(pages) == 0
    assert pool.release(pages) == 1
    assert pool.num_free == 3
    pool.check_integrity(held=[pages[:1]])


def test_an_id_may_occur_twice_in_one_call() -> None:
    pool = bookkeeping(4)
    page = pool.allocate(1)
    twice = np.concatenate([page, page])
    pool.retain(twice)
    assert pool.refcounts(page).tolist() == [3]
    assert pool.release(np.concatenate([twice, page])) == 1
    pool.check_integrity(held=[])


def test_a_page_behind_the_given_one_is_preferred() -> None:
    pool = bookkeeping(10)
    pages = pool.allocate(10)
    pool.release(ids(2, 5, 6, 7))
    assert pool.allocate(1, after=4).tolist() == [5]
    assert pool.allocate(1, after=8).tolist() == [2]  # page 9 is taken: the shortest run that fits
    assert pages.size == 10


def test_best_fit_keeps_long_runs_whole() -> None:
    pool = bookkeeping(12)
    pool.allocate(12)
    pool.release(ids(0, 1, 2, 3, 6, 7, 10))
    assert pool.allocate(2).tolist() == [6, 7]
    assert pool.allocate(4).tolist() == [0, 1, 2, 3]


def test_fragments_are_used_in_as_few_pieces_as_possible() -> None:
    pool = bookkeeping(12)
    pool.allocate(12)
    pool.release(ids(0, 2, 3, 5, 6, 7, 9))
    assert pool.allocate(5).tolist() == [5, 6, 7, 2, 3]


def test_exhaustion_takes_nothing() -> None:
    pool = bookkeeping(4)
    held = pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 pages of 4 tokens wanted, 1 of 4 are free"):
        pool.allocate(2)
    with pytest.raises(PoolTooSmall, match="5 pages of 4 tokens wanted, the whole pool has 4"):
        pool.allocate(5)
    assert pool.num_free == 1
    pool.check_integrity(held=[held])
    assert pool.allocate(1).size == 1  # the limit itself passes


def test_nothing_is_a_legal_amount() -> None:
    pool = bookkeeping(2)
    nothing = pool.allocate(0)
    assert nothing.size == 0
    pool.retain(nothing)
    assert pool.release(nothing) == 0
    pool.check_integrity(held=[nothing])


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (1, 0), (2**31, 1)])
def test_impossible_sizes_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="a pool needs"):
        PagePool([], num_pages=num_pages, page_size=page_size)


def test_negative_amounts_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot allocate -1 pages"):
        bookkeeping(2).allocate(-1)


def test_releasing_too_often_is_loud_and_changes_nothing() -> None:
    pool = bookkeeping(4)
    page = pool.allocate(1)
    with pytest.raises(AssertionError, match=r"\[0\] released more often"):
        pool.release(np.concatenate([page, page]))
    pool.check_integrity(held=[page])
    pool.release(page)
    with pytest.raises(AssertionError, match="are free"):
        pool.release(page)
    with pytest.raises(AssertionError, match="are free"):
        pool.retain(page)
    with pytest.raises(AssertionError, match="outside the pool"):
        pool.retain(ids(-1))


def test_integrity_names_the_page_that_leaked() -> None:
    pool = bookkeeping(4)
    pages = pool.allocate(2)
    with pytest.raises(AssertionError, match=r"\[\(1, 1, 0\)\] as \(page, count, references held\)"):
        pool.check_integrity(held=[pages[:1]])


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4])
def test_copy_moves_exactly_the_tokens_asked_for(num_tokens: int) -> None:
    pool = PagePool([LayerShape(2, 3, 1), LayerShape(1, 2, 2)], num_pages=4, page_size=4)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(float("nan"))
        tensor[4:8] = torch.arange(tensor[4:8].numel(), dtype=torch.float32).view_as(tensor[4:8])
    pool.allocate(2)
    before = [t.clone() for t in (*pool.keys, *pool.values)]
    copy = pool.copy_page(1, num_tokens)
    for old, now in zip(before, (*pool.keys, *pool.values), strict=True):
        assert torch.equal(now[copy * 4 : copy * 4 + num_tokens], old[4 : 4 + num_tokens])
        assert now[copy * 4 + num_tokens : copy * 4 + 4].isnan().all()
        assert torch.equal(now[:8].nan_to_num(), old[:8].nan_to_num())
    assert pool.bytes_copied == num_tokens * pool.page_bytes // pool.page_size
    assert pool.refcounts(ids(1, copy)).tolist() == [1, 1]


def test_copy_refuses_more_than_a_page_and_free_pages() -> None:
    pool = bookkeeping(4)
    pool.allocate(1)
    with pytest.raises(ValueError, match="cannot copy 5 tokens of a page of 4"):
        pool.copy_page(0, 5)
    with pytest.raises(AssertionError, match="are free"):
        pool.copy_page(3, 1)
    assert pool.num_free == 3


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("pages", [ids(1, 2), ids(2, 1), ids(3, 0)])
def test_slots_in_a_row_are_a_view(pages: PageIds, num_tokens: int) -> None:
    pool = PagePool([LayerShape(1, 1, 1)], num_pages=4, page_size=4)
    pool.keys[0][:, 0, 0] = torch.arange(16)
    slots = pool.slots(pages, num_tokens)
    expected = [int(pages[i // 4]) * 4 + i % 4 for i in range(num_tokens)]
    assert pool.keys[0][slots][:, 0, 0].tolist() == expected
    if num_tokens > 4:
        assert isinstance(slots, slice) == (pages.tolist() == [1, 2])


class PoolMachine(RuleBasedStateMachine):
    """Random allocate, retain and release against a plain list of counts."""

    @initialize(num_pages=st.integers(1, 24))
    def create(self, num_pages: int) -> None:
        self.pool = bookkeeping(num_pages)
        self.counts = [0] * num_pages
        self.held: list[PageIds] = []

    def longest_free_run(self) -> int:
        runs = "".join("f" if c == 0 else "h" for c in self.counts).split("h")
        return max(len(run) for run in runs)

    @rule(num_pages=st.integers(0, 10), after=st.none() | st.integers(0, 23))
    def allocate(self, num_pages: int, after: int | None) -> None:
        free = self.counts.count(0)
        if num_pages > free:
            with pytest.raises(PoolExhausted):
                self.pool.allocate(num_pages, after=after)
            return
        behind_held = after is not None and after < len(self.counts) and self.counts[after] > 0
        behind = self.counts[after + 1 : after + 1 + num_pages] if behind_held else []
        longest = self.longest_free_run()
        pages = self.pool.allocate(num_pages, after=after)
        assert all(self.counts[p] == 0 for p in pages.tolist())
        assert len(set(pages.tolist())) == num_pages
        if num_pages and num_pages <= longest:
            assert np.all(np.diff(pages) == 1)
        if after is not None and behind and behind == [0] * num_pages:
            assert pages[0] == after + 1
        for page in pages.tolist():
            self.counts[page] = 1
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))[: data.draw(st.integers(0, 10))]
        self.pool.retain(pages)
        for page in pages.tolist():
            self.counts[page] += 1
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        for page in pages.tolist():
            self.counts[page] -= 1
        assert self.pool.release(pages) == sum(self.counts[p] == 0 for p in pages.tolist())

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(held=self.held)
            everything = np.arange(len(self.counts), dtype=np.int32)
            assert self.pool.refcounts(everything).tolist() == self.counts
            assert self.pool.num_free == self.counts.count(0)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for pages in self.held:
                self.pool.release(pages)
            assert self.pool.allocate(self.pool.num_pages).tolist() == list(range(self.pool.num_pages))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 199), unique=True))
@settings(max_examples=60, deadline=None)
def test_pages_given_back_in_any_order_merge(order: list[int]) -> None:
    pool = bookkeeping(200)
    pool.allocate(200)
    for page in order:
        pool.release(ids(page))
        pool.check_integrity()
    rest = sorted(set(range(200)) - set(order))
    pool.release(np.array(rest, dtype=np.int32))
    assert pool.allocate(200).tolist() == list(range(200))
