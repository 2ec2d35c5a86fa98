"""Waiting for something while a client may go away and a deadline may pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.types import Receive

from kvcomm.server.errors import CLIENT_GONE, ApiError

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
    """The result of `work`, which is cancelled when the client disconnects or the loop's clock passes `deadline_s`.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ApiError: 504 after the deadline; CLIENT_GONE when nobody is left to be answered.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        left_s = deadline_s - asyncio.get_running_loop().time()
        await asyncio.wait((task, gone), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        if gone.done():
            raise client_gone()
        raise timed_out()
    finally:
        gone.cancel()
        task.cancel()
        with anyio.CancelScope(shield=True):  # a scope of anyio's would cancel again, while the work still ends
            await asyncio.wait((task, gone))


async def in_thread(work: Callable[[], T], limiter: anyio.CapacityLimiter | None = None) -> T:
    """Do in a worker thread what makes something; whoever is cancelled meanwhile leaves only once it is done.

    A task that asyncio cancels leaves anyio's threads behind, and what they then make would belong to nobody.

    Args:
        limiter: whose threads; None: those that everything shares.
    """
    thread = asyncio.ensure_future(anyio.to_thread.run_sync(work, limiter=limiter))
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # a scope of anyio's would cancel again and again
        while not thread.done():
            try:
                await asyncio.wait((thread,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        thread.exception()  # nobody is left to be told
        raise cancelled
    return thread.result()


def client_gone() -> ApiError:
    """What becomes of a request when nobody is left to be answered."""
    return ApiError(CLIENT_GONE, "client_gone", "the client has disconnected")


def timed_out() -> ApiError:
    """The answer to a request that takes too long."""
    return ApiError(504, "request_timeout", "the answer took too long and was stopped; ask for fewer tokens, or later")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
