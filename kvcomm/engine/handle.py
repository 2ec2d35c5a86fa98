"""The caller's end of a request: wait for it, stream it, cancel it, from threads or from asyncio.

The engine publishes chunks and, once, an outcome. Chunks are kept, so several readers each see all of them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from kvcomm.engine.results import Chunk, Completion

logger = logging.getLogger("kvcomm.engine")


class RequestHandle:
    """A request in flight. Iterating yields its chunks; leaving an iteration early cancels the request.

    Attributes:
        tenant: whose request it is.
        engine_id: tells the engine that computes it from others.
    """

    def __init__(
        self, request_id: int, cancel: Callable[[], None], *, tenant: str = "default", engine_id: int | None = None
    ) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.engine_id = engine_id
        self.keeps: object = None  # the engine, which must not be collected while somebody waits for its answer
        self._cancel = cancel
        self._drawn: list[int] = []
        self._changed = threading.Condition()
        self._chunks: list[Chunk] = []
        self._outcome: Completion | BaseException | None = None
        self._wakers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        outcome, chunks = self._outcome, len(self._chunks)
        state = f"in flight, {chunks} chunks so far" if outcome is None else f"ended by {type(outcome).__name__}"
        return f"RequestHandle({self.request_id}, {outcome if isinstance(outcome, Completion) else state})"

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._outcome is not None

    @property
    def outcome(self) -> Completion | BaseException | None:
        """How the request has ended, raising nothing; None: it has not."""
        return self._outcome

    @property
    def drawn(self) -> tuple[int, ...]:
        """Token ids of the first choice whose text is out so far; what the answer keeps of them may be less."""
        return tuple(self._drawn)

    def cancel(self) -> None:
        """Stop the request at the next step; its pages are returned. No effect once it has ended."""
        self._cancel()

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the end.

        Raises:
            TimeoutError: not finished within `timeout_s`; the request goes on.
            KVCommError: what ended the request instead; RequestCancelled after `cancel`.
        """
        try:
            with self._changed:
                finished = self._changed.wait_for(lambda: self.done, timeout_s)
        except BaseException:
            # Ctrl-C while waiting: nobody is left to take the answer.
            self.cancel()
            raise
        if not finished:
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout_s} s")
        return self._take_outcome()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end without asking how it ended; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout_s)

    async def aresult(self) -> Completion:
        """`result` for asyncio."""
        async for _ in self:
            pass
        return self._take_outcome()

    def __iter__(self) -> Iterator[Chunk]:
        seen, complete = 0, False
        try:
            while not complete:
                with self._changed:
                    while len(self._chunks) == seen and not self.done:
                        self._changed.wait()
                    fresh, complete = self._chunks[seen:], self.done
                seen += len(fresh)
                yield from fresh
        finally:
            if not complete:
                self.cancel()
        self._take_outcome()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # The loop may be closed at any moment, also between two lines of this: then nobody is listening.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._wakers.append(wake)
        seen, complete = 0, False
        try:
            while not complete:
                news.clear()
                with self._changed:
                    fresh, complete = self._chunks[seen:], self.done
                seen += len(fresh)
                for chunk in fresh:
                    yield chunk
                if not complete:
                    await news.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
            if not complete:
                self.cancel()
        self._take_outcome()

    def publish(self, chunk: Chunk) -> None:
        """For the engine: hand out a chunk."""
        with self._changed:
            self._chunks.append(chunk)
            if chunk.choice == 0:
                self._drawn += chunk.token_ids
        self._notify()

    def cancelled_by(self, cancel: Callable[[], None]) -> None:
        """For the engine: from now on this is how the request is stopped."""
        with self._changed:
            if self._outcome is None:
                self._cancel = cancel

    def settle(self, outcome: Completion | BaseException) -> None:
        """For the engine: end the request, once."""
        with self._changed:
            assert self._outcome is None, f"request {self.request_id} settled twice"
            self._outcome = outcome
            self._cancel = _nothing  # which knew the request: what nobody refers to is gone without a collector
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            try:
                wake()
            except Exception:  # one reader that cannot be woken is no reason to leave the others waiting
                logger.exception("a reader of request %d could not be woken", self.request_id)

    def _take_outcome(self) -> Completion:
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def _nothing() -> None:
    """Cancels a request that has ended."""
