"""Turns: never more inside than may be, tenants one after the other, nobody forgotten, whoever is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.server.workers import LONG_BYTES, NUM_LONG, NUM_SHORT, FairGate, Workers

PATIENCE_S = 60


def test_tenants_take_turns() -> None:
    """A second tenant's first request waits for one of the first tenant's, not for all."""

    async def check() -> list[str]:
        gate, order = FairGate(1), []

        async def work(tenant: str, name: str) -> None:
            async with gate.turn(tenant):
                order.append(name)
                await asyncio.sleep(0)

        arrivals = [("ann", f"a{index}") for index in range(5)] + [("bob", f"b{index}") for index in range(3)]
        await asyncio.gather(*(work(*each) for each in arrivals))
        assert (gate.num_inside, gate.num_waiting) == (0, 0)
        return order

    assert asyncio.run(check()) == ["a0", "a1", "b0", "a2", "b1", "a3", "b2", "a4"]


@given(
    limit=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel"]), st.integers(0, 20)), max_size=40),
)
def test_a_gate_keeps_its_law(limit: int, steps: list[tuple[str, int]]) -> None:
    """Somebody waits only while all places are taken, whatever comes, goes or is cancelled, in whatever order."""

    async def check() -> None:
        gate = FairGate(limit)
        tasks: list[asyncio.Task[None]] = []
        inside: list[str] = []
        go_on: dict[str, asyncio.Event] = {}

        async def stay(name: str, tenant: str) -> None:
            async with gate.turn(tenant):
                inside.append(name)
                try:
                    await go_on[name].wait()
                finally:
                    inside.remove(name)

        for index, (step, which) in enumerate(steps):
            if step == "enter":
                name = str(index)
                go_on[name] = asyncio.Event()
                tasks.append(asyncio.ensure_future(stay(name, f"tenant{which % 3}")))
            elif step == "leave" and inside:
                go_on[inside[which % len(inside)]].set()
            elif step == "cancel" and tasks:
                tasks[which % len(tasks)].cancel()
            if which % 2:  # else the next step comes before anybody has noticed this one
                for _ in range(5):
                    await asyncio.sleep(0)
                num_alive = sum(not task.done() for task in tasks)
                assert len(inside) == gate.num_inside == min(limit, num_alive)
                assert gate.num_waiting == num_alive - gate.num_inside
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.num_inside, gate.num_waiting, gate._waiting) == (0, 0, {})

    asyncio.run(check())


def test_short_work_never_waits_for_long_work() -> None:
    """All threads for long work are taken, by one tenant, and more of it waits."""

    async def check() -> None:
        workers, go_on, began = Workers(1), threading.Event(), threading.Semaphore(0)

        def long() -> None:
            began.release()
            assert go_on.wait(PATIENCE_S)

        waiting = [asyncio.ensure_future(workers.run("ann", LONG_BYTES, long)) for _ in range(NUM_LONG + 5)]
        for _ in range(NUM_LONG):
            assert await asyncio.to_thread(began.acquire, timeout=PATIENCE_S)
        thread = await workers.run("ann", LONG_BYTES - 1, threading.get_ident)
        assert thread != threading.get_ident()
        assert workers.long.num_waiting == 5
        go_on.set()
        await asyncio.gather(*waiting)

    asyncio.run(check())


def test_threads_are_bounded() -> None:
    async def check() -> None:
        workers, lock, running, most = Workers(1), threading.Lock(), Counter[str](), Counter[str]()

        def work(kind: str) -> None:
            with lock:
                running[kind] += 1
                most[kind] = max(most[kind], running[kind])
            threading.Event().wait(0.002)
            with lock:
                running[kind] -= 1

        sizes = {"short": 0, "long": LONG_BYTES}
        runs = [workers.run("ann", sizes[kind], lambda kind=kind: work(kind)) for kind in sizes for _ in range(20)]
        await asyncio.gather(*runs)
        assert most["short"] <= NUM_SHORT
        assert most["long"] <= NUM_LONG

    asyncio.run(check())


def test_what_work_raises_is_raised_and_its_turn_is_over() -> None:
    async def check() -> None:
        workers = Workers(1)
        for _ in range(NUM_SHORT + 1):
            with pytest.raises(ZeroDivisionError):
                await workers.run("ann", 1, lambda: 1 // 0)
        assert workers.short.num_inside == 0

    asyncio.run(check())


def test_the_last_places_are_for_others() -> None:
    """A tenant that has all but a few places waits; a second one and a third go past it."""

    async def check() -> None:
        gate = FairGate(16, lambda: 4)
        entering = {name: [asyncio.ensure_future(gate.enter(name)) for _ in range(20)] for name in ("ann", "bob", "cy")}
        for _ in range(5):
            await asyncio.sleep(0)
        entered = {name: sum(task.done() for task in tasks) for name, tasks in entering.items()}
        assert entered == {"ann": 12, "bob": 2, "cy": 1}
        for _ in range(3):  # the first tenant goes out, and what is free goes to those who hold few
            gate.leave("ann")
            await asyncio.sleep(0)
        entered = {name: sum(task.done() for task in tasks) for name, tasks in entering.items()}
        assert entered == {"ann": 12, "bob": 3, "cy": 2}
        for tasks in entering.values():
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.num_waiting == 0

    asyncio.run(check())
