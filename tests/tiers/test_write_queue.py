"""The queue: bounded, without doubles, and whoever gives work is told once that it has ended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.errors import StoreFailed
from kvcomm.tiers.write_queue import Dropped, WorkBudget, WriteQueue, WriteTask
from tests.limits import PATIENCE_S


class Log:
    """What was written and what has ended."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.ended: Counter[str] = Counter()
        self.may_go_on = threading.Event()
        self.is_writing = threading.Event()

    def work(self, name: str, num_bytes: int = 1, write: Callable[[], object] | None = None) -> WriteTask:
        return WriteTask(
            name, num_bytes, write or (lambda: self.written.append(name)), lambda: self.ended.update([name])
        )

    def stuck(self, name: str) -> WriteTask:
        def write() -> None:
            self.is_writing.set()
            self.may_go_on.wait(PATIENCE_S)
            self.written.append(name)

        return self.work(name, write=write)


def test_everything_is_written_in_order_and_ends_once() -> None:
    log, queue = Log(), WriteQueue()
    for name in "abc":
        assert queue.add(log.work(name)) is None
    assert queue.flush(PATIENCE_S)
    assert log.written == ["a", "b", "c"]
    queue.close(PATIENCE_S)
    assert log.ended == Counter("abc")
    assert (queue.num_waiting, queue.num_bytes, queue.dropped()) == (0, 0, {})


def test_bounds_and_doubles() -> None:
    log, queue = Log(), WriteQueue(max_items=3, max_bytes=10)
    queue.add(log.stuck("a"))
    log.is_writing.wait(PATIENCE_S)
    assert queue.add(log.work("a")) is Dropped.SAME  # it is being written
    assert queue.add(log.work("b", 9)) is None
    assert queue.add(log.work("c", 1)) is Dropped.FULL  # of bytes
    assert queue.add(log.work("d", 0)) is None
    assert queue.add(log.work("e", 0)) is Dropped.FULL  # of items
    assert log.ended == Counter("ace")
    log.may_go_on.set()
    assert queue.flush(PATIENCE_S)
    assert log.written == ["a", "b", "d"]
    assert queue.dropped() == {"same": 1, "full": 2}
    queue.close(PATIENCE_S)


@pytest.mark.parametrize("error", [StoreFailed("the wire is cut"), NameError("a fault of ours")])
def test_a_write_that_fails_does_not_end_the_thread(error: Exception) -> None:
    """Bug: one that nobody had foreseen did, and whoever waited for the queue waited in vain."""
    log, queue = Log(), WriteQueue()

    def fail() -> None:
        raise error

    queue.add(log.work("a", write=fail))
    queue.add(log.work("b"))
    assert queue.flush(PATIENCE_S)
    queue.close(PATIENCE_S)
    assert (log.written, log.ended, queue.dropped()) == (["b"], Counter("ab"), {"failed": 1})


def test_closing_drops_what_a_hanging_write_keeps_waiting() -> None:
    log, queue = Log(), WriteQueue()
    queue.add(log.stuck("a"))
    log.is_writing.wait(PATIENCE_S)
    queue.add(log.work("b"))
    queue.close(0.05)
    assert log.ended == Counter("b")
    assert queue.add(log.work("c")) is Dropped.CLOSED
    log.may_go_on.set()
    assert queue.flush(PATIENCE_S)
    assert log.ended == Counter("abc")


def test_closing_one_that_was_never_used() -> None:
    WriteQueue().close(0)


def test_the_budget_is_a_share_of_the_time() -> None:
    now = [0.0]
    budget = WorkBudget(0.25, 5.0, lambda: now[0])
    assert budget.wait_s() == 0
    budget.worked(5.0)  # the loan
    assert budget.wait_s() == 0
    budget.worked(1.0)
    assert budget.wait_s() == pytest.approx(4.0)
    now[0] += 4.0
    assert budget.wait_s() == pytest.approx(0.0)
    now[0] += 10_000.0
    budget.worked(6.0)  # no more than the loan is saved up
    assert budget.wait_s() == pytest.approx(4.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=50))
@settings(max_examples=60, deadline=None)
def test_never_more_than_share_and_loan_are_spent(steps: list[tuple[float, float]]) -> None:
    now, spent, longest = [0.0], 0.0, 0.0
    budget = WorkBudget(0.5, 2.0, lambda: now[0])
    for pause, work in steps:
        now[0] += pause + budget.wait_s()
        now[0] += work
        budget.worked(work)
        spent, longest = spent + work, max(longest, work)
        assert spent <= 0.5 * now[0] + 2.0 + longest + 1e-6
