from __future__ import annotations

import threading
from collections.abc import Callable

from kvcomm.integrations.vllm.fair_lock import FairLock


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def started(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def test_steps_and_passes_never_overlap() -> None:
    turns, inside, most = FairLock(), [0], [0]

    def work(enter: Callable[[], object]) -> None:
        for _ in range(200):
            with enter():  # type: ignore[attr-defined]
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    turns.add_urgent(1)
    threads = [started(lambda: work(turns.guest)), started(lambda: work(lambda: turns.host(1)))]
    for thread in threads:
        thread.join()
    assert most == [1]


def test_who_came_first_goes_first() -> None:
    turns, order, waiting = FairLock(), [], threading.Event()
    turns.add_urgent(1)

    def guest() -> None:
        waiting.set()
        with turns.guest():
            order.append("guest")

    with turns.host(1):
        thread = started(guest)
        waiting.wait()
        while len(turns._queue) < 2:
            pass
        order.append("host")
    thread.join()
    with turns.host(1):
        order.append("host")
    assert order == ["host", "guest", "host"]


def test_learning_waits_for_a_busy_host() -> None:
    clock = Clock()
    turns = FairLock(share=0.1, idle_after_s=0.01, clock=clock)

    def step(seconds: float) -> None:
        with turns.host(1):
            clock.now_s += seconds

    def learn(seconds: float) -> None:
        with turns.guest():
            clock.now_s += seconds

    step(1.0)
    learn(0.3)  # its share was not spent yet
    step(1.0)
    assert not turns._may_learn()
    done = threading.Event()

    def learn_more() -> None:
        learn(0.3)
        done.set()

    thread = started(learn_more)
    assert not done.wait(0.05)
    clock.now_s += 1.0  # the host has nothing to do any more
    assert done.wait(10)
    thread.join()


def test_a_request_does_not_wait_for_its_share() -> None:
    clock = Clock()
    turns = FairLock(share=0.0, clock=clock)
    with turns.host(1):
        clock.now_s += 1.0
    with turns.guest():
        clock.now_s += 1.0
    with turns.host(1):
        clock.now_s += 1.0
    done = threading.Event()

    def guest() -> None:
        with turns.guest():
            done.set()

    thread = started(guest)
    assert not done.wait(0.05)
    turns.add_urgent(1)
    assert done.wait(10)
    thread.join()
    turns.add_urgent(-1)


def test_prices_are_of_prompts() -> None:
    clock = Clock()
    turns = FairLock(clock=clock)
    for num_tokens, seconds in ((1, 5.0), (100, 1.0), (0, 9.0)):
        with turns.host(num_tokens):
            clock.now_s += seconds
    assert turns.token_s == 0.01


def test_closing_lets_everybody_go() -> None:
    clock = Clock()
    turns = FairLock(share=0.0, clock=clock)
    with turns.host(1):
        clock.now_s += 1.0
    with turns.guest():
        clock.now_s += 1.0
    with turns.host(1):
        clock.now_s += 1.0
    done = threading.Event()

    def guest() -> None:
        with turns.guest():
            done.set()

    thread = started(guest)
    turns.close()
    assert done.wait(10)
    thread.join()
