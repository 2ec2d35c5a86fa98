"""Waiting for something while a client may go away and a deadline may pass."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

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
            raise ApiError(CLIENT_GONE, "client_gone", "the client has disconnected")
        raise timed_out()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))


def timed_out() -> ApiError:
    """The answer to a request that takes too long."""
    return ApiError(504, "request_timeout", "the answer took too long and was stopped; ask for fewer tokens, or later")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
