"""Idle work: order, bounds, failures, and that whatever a job holds comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from threading import RLock

import numpy as np
import pytest

from kvcomm.errors import PoolExhausted
from kvcomm.reuse.idle_work import MAX_JOBS, IdleWork, Job, Steps


class Bench:
    """Jobs that write down what happens to them."""

    def __init__(self) -> None:
        self.idle = IdleWork(RLock())
        self.done: list[str] = []
        self.released: list[str] = []

    def add(self, name: str, steps: int = 1, *, is_urgent: bool = False, error: Exception | None = None) -> Job:
        def work() -> Steps:
            for step in range(steps):
                self.done.append(f"{name}{step}")
                if error is not None:
                    raise error
                yield

        pages = [np.array([len(self.done)], dtype=np.int32)]
        job = Job(work(), lambda: self.released.append(name), lambda: pages, is_urgent)
        self.idle.add(job)
        return job

    def run(self) -> None:
        while self.idle.has_work:
            self.idle.step()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.idle.close()
    assert not list(bench.idle.pages_held())


def test_jobs_run_pass_by_pass_urgent_ones_first(bench: Bench) -> None:
    bench.add("a", 2)
    bench.add("b")
    bench.add("c", is_urgent=True)
    bench.run()
    assert bench.done == ["c0", "a0", "a1", "b0"]
    assert bench.released == ["c", "a", "b"]
    assert bench.idle.num_done == 3


@pytest.mark.parametrize("error", [ValueError("broken"), PoolExhausted("full")])
def test_a_failing_job_harms_nobody(bench: Bench, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    bench.add("a", error=error)
    bench.add("b")
    with caplog.at_level(logging.INFO):
        bench.run()
    assert bench.done == ["a0", "b0"]
    assert bench.released == ["a", "b"]
    assert (bench.idle.num_done, bench.idle.num_failed) == (1, 1)
    assert caplog.records


def test_too_many_jobs_drop_the_oldest_nobody_waits_for(bench: Bench) -> None:
    bench.add("urgent", is_urgent=True)
    for index in range(MAX_JOBS + 2):
        bench.add(f"job{index} ")
    assert bench.released == ["job0 ", "job1 "]
    bench.run()
    assert bench.done[0] == "urgent0"
    assert len(bench.done) == MAX_JOBS + 1


def test_studies_give_way_and_urgent_ones_do_not(bench: Bench) -> None:
    bench.add("urgent", is_urgent=True)
    bench.add("study")
    assert bench.idle.give_way()
    assert not bench.idle.give_way()
    assert bench.released == ["study"]


def test_what_a_job_holds_is_accounted_for_until_it_ends(bench: Bench) -> None:
    bench.add("a", 2)
    bench.idle.step()
    assert len(list(bench.idle.pages_held())) == 1
    bench.idle.close()
    assert bench.released == ["a"]
    assert not bench.idle.has_work
