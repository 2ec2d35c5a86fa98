"""Working on several things at the same time, from threads that mostly wait for an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from kvcomm import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")


def at_once(engine: Engine, work: Callable[[Item], Result], items: Iterable[Item], width: int) -> Iterator[Result]:
    """Results as they come, `width` items in work at a time.

    Whatever goes wrong, Ctrl-C included, ends it soon: the engine is closed, so that nobody waits for an answer that
    nobody wants any more. The first error is raised.
    """
    threads = ThreadPoolExecutor(width, thread_name_prefix="kvcomm-eval")
    try:
        pending: list[Future[Result]] = [threads.submit(work, item) for item in items]
        for future in as_completed(pending):
            yield future.result()
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        engine.close()
        raise
    finally:
        threads.shutdown()
