"""The engine's thread: who is served first. Fakes stand for requests and idle jobs."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.request import Request
from kvcomm.errors import InvalidRequest
from tests.limits import PATIENCE_S, wait_for


class Work:
    """A queue of requests, or of idle jobs, that writes down what is done."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done, self.num_waiting = name, done, 0

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0

    def submit(self, request: Request) -> None:
        self.num_waiting += 1

    def step(self) -> None:
        self.num_waiting -= 1
        self.done.append(self.name)

    def close(self, error: Exception | None = None) -> None:
        pass


def test_the_next_agent_of_a_team_comes_before_idle_work() -> None:
    """However much later it comes, while the moment lasts: here it lasts until the test ends."""
    done: list[str] = []
    requests, idle = Work("request", done), Work("idle", done)
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), 10 * PATIENCE_S)
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
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), 0.1)
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
    loop = EngineLoop(cast(Any, requests), cast(Any, Work("idle", done)))
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
    loop = EngineLoop(cast(Any, Work("request", done)), cast(Any, idle), 1000.0)
    idle.num_waiting = 2
    loop.wake()
    assert loop.wait_idle(PATIENCE_S)
    loop.close()
    assert done == ["idle", "idle"]


def test_closing_does_not_wait_for_idle_work() -> None:
    done: list[str] = []
    requests, idle = Work("request", done), Work("idle", done)
    loop = EngineLoop(cast(Any, requests), cast(Any, idle), 1000.0)
    idle.num_waiting = 1
    loop.submit(cast(Request, None))
    wait_for(lambda: done)
    loop.close()
    assert done == ["request"]


def test_a_negative_wait_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="idle_after_s must be at least 0, not -1"):
        EngineConfig(idle_after_s=-1)
