"""Engines that stop where a test wants them, so that it does not have to be faster than they are."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvcomm.engine.engine import Engine


@contextmanager
def stalling(engine: Engine, *, after: int = 0, written: int | None = None) -> Iterator[threading.Event]:
    """The engine makes `after` more steps, then none until the event is set or the `with` statement ends.

    It goes on for whoever gives up its request, or closes it. With `written` it stops instead as soon as an answer has
    so many tokens: how many one step writes, and how many a prompt takes, is up to measured costs.
    """
    step, steps, go_on = engine.scheduler.step, itertools.count(), threading.Event()

    def may_go_on() -> bool:
        is_given_up = any(request.is_cancelled for request in engine.scheduler.requests())
        return is_given_up or engine._workings.loop._is_closing

    def is_due() -> bool:
        if written is None:
            return next(steps) >= after
        return any(
            len(each.token_ids) >= written for request in engine.scheduler.requests() for each in request.branches
        )

    def stalling_step() -> None:
        if is_due():
            while not go_on.wait(0.005) and not may_go_on():
                pass
        if not engine._workings.loop._is_closing:
            step()

    engine.scheduler.step = stalling_step  # type: ignore[method-assign]
    try:
        yield go_on
    finally:
        go_on.set()
        engine.scheduler.step = step  # type: ignore[method-assign]
