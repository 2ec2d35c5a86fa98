"""Idle work: order, bounds, failures, and that whatever a job holds comes back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from threading import RLock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.errors import PoolExhausted
from kvcomm.reuse.idle_work import MAX_STUDIES, IdleWork, Job, Steps, Urgency


class Bench:
    """Jobs that write down what happens to them."""

    def __init__(self) -> None:
        self.idle = IdleWork(RLock())
        self.done: list[str] = []
        self.released: list[str] = []

    def add(
        self,
        name: str,
        steps: int = 1,
        *,
        urgency: Urgency = Urgency.STUDY,
        pays_after: float = math.inf,
        can_wait: Callable[[], bool] = lambda: False,
        error: Exception | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        def work() -> Steps:
            for step in range(steps):
                self.done.append(f"{name}{step}")
                meanwhile()
                if error is not None:
                    raise error
                yield

        pages = [np.array([len(self.done)], dtype=np.int32)]
        self.idle.add(Job(work(), lambda: self.released.append(name), lambda: pages, urgency, pays_after, can_wait))

    def run(self) -> None:
        while self.idle.jobs:
            self.idle.step()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.idle.close()
    assert not list(bench.idle.pages_held())
    assert len(set(bench.released)) == len(bench.released)


def test_awaited_jobs_come_first_then_audits_then_studies_that_pay_soonest(bench: Bench) -> None:
    bench.add("late", pays_after=7)
    bench.add("never")
    bench.add("soon", pays_after=1)
    bench.add("audit", urgency=Urgency.AUDIT)
    bench.add("awaited", urgency=Urgency.AWAITED)
    bench.run()
    assert bench.done == ["awaited0", "audit0", "soon0", "late0", "never0"]
    assert bench.released == ["awaited", "audit", "soon", "late", "never"]


def test_an_audit_that_can_wait_does_so_for_studies_that_pay_and_is_done_all_the_same(bench: Bench) -> None:
    waits = [True]
    bench.add("never")
    bench.add("audit", urgency=Urgency.AUDIT, can_wait=lambda: waits[0])
    bench.add("soon", pays_after=1, meanwhile=waits.clear)
    bench.idle.step()
    assert bench.done == ["soon0"]
    waits.append(False)
    bench.add("later", pays_after=1)
    bench.run()
    assert bench.done == ["soon0", "audit0", "later0", "never0"]


def test_what_has_begun_is_finished_before_its_like_and_after_more_urgent_jobs(bench: Bench) -> None:
    bench.add("a", 3, pays_after=5)
    bench.idle.step()
    bench.add("b", pays_after=1)
    bench.idle.step()
    bench.add("audit", urgency=Urgency.AUDIT)
    bench.run()
    assert bench.done == ["a0", "a1", "audit0", "b0", "a2"]  # an audit in between: then the order begins anew


@given(st.lists(st.tuples(st.sampled_from(Urgency), st.sampled_from([0.0, 1.0, 2.0, math.inf])), max_size=12))
def test_jobs_of_one_pass_are_done_in_order(asked: list[tuple[Urgency, float]]) -> None:
    bench = Bench()
    for index, (urgency, pays_after) in enumerate(asked):
        bench.add(f"{index} ", urgency=urgency, pays_after=pays_after)
    bench.run()
    order = sorted(range(len(asked)), key=lambda index: (asked[index][0], asked[index][1], index))
    assert bench.done == [f"{index} 0" for index in order]


@pytest.mark.parametrize("error", [ValueError("broken"), PoolExhausted("full")])
def test_a_failing_job_harms_nobody(bench: Bench, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    bench.add("a", error=error)
    bench.add("b")
    with caplog.at_level(logging.INFO):
        bench.run()
    assert bench.done == ["a0", "b0"]
    assert bench.released == ["a", "b"]
    assert len(caplog.records) == 1


def test_of_too_many_studies_the_one_that_pays_latest_is_dropped_and_no_other_job(bench: Bench) -> None:
    bench.add("awaited", urgency=Urgency.AWAITED)
    bench.add("audit", urgency=Urgency.AUDIT)
    for index in range(MAX_STUDIES):
        bench.add(f"study{index} ", pays_after=index % 5)
    assert bench.released == []
    bench.add("late ", pays_after=100)
    bench.add("soon ", pays_after=0)
    assert bench.released == ["late ", "study4 "]
    bench.run()
    assert bench.done[:2] == ["awaited0", "audit0"]
    assert len(bench.done) == MAX_STUDIES + 2


def test_studies_give_way_and_others_do_not(bench: Bench) -> None:
    bench.add("awaited", urgency=Urgency.AWAITED)
    bench.add("audit", urgency=Urgency.AUDIT)
    bench.add("soon", pays_after=1)
    bench.add("late", pays_after=2)
    assert len(bench.idle.droppable_pages()) == 2
    assert bench.idle.give_way()
    assert bench.released == ["late"]
    assert bench.idle.give_way()
    assert not bench.idle.give_way()
    assert bench.released == ["late", "soon"]
    assert len(bench.idle.jobs) == 2


def test_a_study_in_the_middle_of_a_pass_does_not_give_way(bench: Bench) -> None:
    found: list[object] = []
    bench.add("a", 2, meanwhile=lambda: found.append((bench.idle.droppable_pages(), bench.idle.give_way())))
    bench.idle.step()
    assert found == [([], False)]
    assert bench.released == []
    assert bench.idle.give_way()  # between passes it does
    assert bench.released == ["a"]


def test_what_a_job_holds_is_accounted_for_until_it_ends(bench: Bench) -> None:
    bench.add("a", 2)
    bench.idle.step()
    assert len(list(bench.idle.pages_held())) == 1
    bench.idle.close()
    assert bench.released == ["a"]
    assert not bench.idle.jobs


def test_closing_in_the_middle_of_a_pass_drops_that_job_behind_it(bench: Bench) -> None:
    """Bug: Python does not let a generator that runs be closed, so that neither it nor the jobs behind it were."""
    bench.add("a", 3, meanwhile=bench.idle.close)
    bench.add("b")
    bench.idle.step()
    assert bench.done == ["a0"]
    assert bench.released == ["b", "a"]
    assert not bench.idle.jobs
    bench.add("c")
    assert bench.released == ["b", "a", "c"]
    assert not bench.idle.jobs


def test_steps_are_told_of_the_end_before_what_they_hold_is_given_back(bench: Bench) -> None:
    told: list[str] = []

    def work() -> Steps:
        try:
            yield
            yield
        finally:
            told.append("steps")

    bench.idle.add(Job(work(), lambda: told.append("released"), lambda: ()))
    bench.idle.step()
    bench.idle.close()
    assert told == ["steps", "released"]


def test_a_step_without_jobs_takes_no_time(bench: Bench) -> None:
    assert bench.idle.step() == 0.0
    bench.add("a")
    took_s = bench.idle.step() + bench.idle.step()
    assert took_s == bench.idle.worked_s > 0


def test_who_needs_pages_waits_for_audits_and_for_what_has_begun(bench: Bench) -> None:
    """Studies that have not begun are dropped instead; nobody waits for all of them to be done."""
    bench.add("study", steps=2)
    assert not bench.idle.holds_on()
    bench.idle.step()
    assert bench.idle.holds_on()
    bench.add("audit", urgency=Urgency.AUDIT)
    while bench.idle.give_way():
        pass
    assert bench.idle.holds_on()
    bench.run()
    assert not bench.idle.holds_on()
