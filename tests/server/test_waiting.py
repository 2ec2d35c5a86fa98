"""Work in threads and callers that are cancelled."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest
from starlette.types import Message

from kvcomm.server.waiting import in_thread, while_connected
from tests.limits import PATIENCE_S


def test_a_result_and_an_error() -> None:
    async def check() -> None:
        assert await in_thread(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)

    asyncio.run(check())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("by_scope", [False, True])
def test_who_is_cancelled_leaves_once_the_work_is_done(fails: bool, by_scope: bool) -> None:
    has_begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def work() -> None:
        has_begun.set()
        assert go_on.wait(PATIENCE_S)
        seen.append("made")
        if fails:
            raise ValueError

    async def caller(scope: anyio.CancelScope) -> None:
        with scope:
            try:
                await in_thread(work)
            finally:
                seen.append("left")

    async def check() -> None:
        scope = anyio.CancelScope()
        task = asyncio.ensure_future(caller(scope))
        while not has_begun.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            (scope if by_scope else task).cancel()
            await asyncio.sleep(0.001)
        assert seen == []
        go_on.set()
        await asyncio.wait((task,))
        if by_scope:  # a scope's cancellation ends with it, and comes at the next wait; errors are told before
            assert isinstance(task.exception(), ValueError) == fails
        else:
            assert task.cancelled()

    asyncio.run(check())
    assert seen == ["made", "left"]


def test_work_of_a_request_has_ended_when_its_scope_is_left() -> None:
    """Whoever closes what the work used, such as a stream, must not meet it still running."""
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            seen.append("ended")

    async def silent() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def caller(scope: anyio.CancelScope) -> None:
        with scope:
            try:
                await while_connected(silent, work(), deadline_s=asyncio.get_running_loop().time() + PATIENCE_S)
            finally:
                seen.append("left")

    async def check() -> None:
        scope = anyio.CancelScope()
        task = asyncio.ensure_future(caller(scope))
        await asyncio.sleep(0.001)
        scope.cancel()
        await task
        assert seen == ["ended", "left"]

    asyncio.run(check())
