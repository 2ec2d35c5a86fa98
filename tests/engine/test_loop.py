"""The engine's thread: who is served first. Fakes stand for requests and idle jobs."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine import loop as loop_module
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.request import Request
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.budget import LOAN_S, OVERDUE_S, Budget
from tests.limits import PATIENCE_S, wait_for


class NoOpenPrompts:
    has_work = False
    readings = ()


class Work:
    """A queue of requests, or of idle jobs, that writes down what is done."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done, self.num_waiting = name, done, 0

    awaits_first_token = False
    awaits_jobs = False
    took_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0

    @property
    def jobs(self) -> range:
        return range(self.num_waiting)

    @property
    def has_requests(self) -> bool:
        return self.has_work

    @property
    def read_along(self) -> NoOpenPrompts:
        return NoOpenPrompts()

    def submit(self, request: Request) -> None:
        self.num_waiting += 1

    def step(self) -> float:
        self.num_waiting -= 1
        self.done.append(self.name)
        return self.took_s

    def close(self, error: Exception | None = None) -> None:
        pass


def test_the_next_agent_of_a_team_comes_before_idle_work() -> None:
    """However much later it comes, while the moment lasts: here it lasts until the test ends."""
    done: list[str] = []
    requests, idle = Work("request", done), Work("idle", done)
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), Budget(0.0), 10 * PATIENCE_S)
    idle.num_waiting = 1
    try:
        for num_asked in (1, 2):
            loop.submit(cast(Request, None))
            wait_for(lambda num_asked=num_asked: len(done) == num_asked)
    finally:
        loop.close()
    assert done == ["request", "request"]


def test_idle_work_comes_a_moment_after_the_last_request() -> None:
    done: list[str] = []
    requests, idle = Work("request", done), Work("idle", done)
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), Budget(0.0), 0.1)
    idle.num_waiting = 1
    loop.submit(cast(Request, None))
    assert loop.wait_idle(PATIENCE_S)
    loop.close()
    assert done == ["request", "idle"]


def test_requests_fail_even_if_whoever_closes_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C again, while the last step goes on: others still wait for their requests."""
    done: list[str] = []
    requests, go_on, has_failed = Work("request", done), threading.Event(), threading.Event()
    step = requests.step

    def long_step() -> None:
        go_on.wait(PATIENCE_S)
        step()

    monkeypatch.setattr(requests, "step", long_step)
    monkeypatch.setattr(requests, "close", lambda error: has_failed.set())
    loop = EngineLoop(cast(Any, requests), cast(Any, Work("idle", done)), Budget(0.1))
    loop.submit(cast(Request, None))

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.close()
    go_on.set()
    assert has_failed.wait(PATIENCE_S)


def test_idle_work_needs_no_request_to_begin() -> None:
    done: list[str] = []
    idle = Work("idle", done)
    loop = EngineLoop(cast(Any, Work("request", done)), cast(Any, idle), Budget(0.0), 1000.0)
    idle.num_waiting = 2
    loop.wake()
    assert loop.wait_idle(PATIENCE_S)
    loop.close()
    assert done == ["idle", "idle"]


def test_closing_does_not_wait_for_idle_work() -> None:
    done: list[str] = []
    requests, idle = Work("request", done), Work("idle", done)
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), Budget(0.0), 1000.0)
    idle.num_waiting = 1
    loop.submit(cast(Request, None))
    wait_for(lambda: done)
    loop.close()
    assert done == ["request"]


def test_a_negative_wait_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="idle_after_s must be at least 0, not -1"):
        EngineConfig(idle_after_s=-1)


class Clock:
    """What the loop takes the time by: serving a request takes a second, and nothing else does."""

    def __init__(self, requests: Work) -> None:
        self.requests = requests

    def perf_counter(self) -> float:
        return float(self.requests.done.count(self.requests.name))

    def monotonic(self) -> float:
        return time.monotonic()


def busy(share: float, monkeypatch: pytest.MonkeyPatch, *, awaits: bool = False) -> tuple[list[str], Budget]:
    """What is done while 200 requests come without a pause, each of one second, beside jobs of a second each."""
    done: list[str] = []
    requests, idle, budget = Work("request", done), Work("idle", done), Budget(share)
    idle.took_s, requests.awaits_first_token = 1.0, awaits
    monkeypatch.setattr(loop_module, "time", Clock(requests))
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), budget, 10 * PATIENCE_S)
    requests.num_waiting, idle.num_waiting = 200, 1000
    loop.wake()
    wait_for(lambda: not requests.num_waiting)
    loop.close()
    return done, budget


def test_idle_work_has_its_share_while_requests_come_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    done, budget = busy(0.1, monkeypatch)
    num_idle = done.count("idle")
    assert done.count("request") == 200
    assert budget.spent_s == num_idle
    assert 200 / 9 <= num_idle <= (200 + LOAN_S) / 9 + 1
    assert done[:2] == ["request", "idle"]  # what is learned first pays longest


def test_nothing_is_learned_beside_requests_where_nothing_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    done, budget = busy(0.0, monkeypatch)
    assert done == ["request"] * 200
    assert budget.spent_s == 0


def test_first_tokens_wait_for_it_only_when_there_is_no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done, budget = busy(0.1, monkeypatch, awaits=True)
    num_first = int(OVERDUE_S / 0.1)
    assert done[:num_first] == ["request"] * num_first
    assert 0.1 * (200 + budget.spent_s) - OVERDUE_S - 1 <= budget.spent_s <= 0.1 * (200 + budget.spent_s)
