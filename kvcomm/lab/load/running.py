"""Sending a workload: so many requests at once at most, each session in its own order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvcomm.lab.load.client import ChatMessage, Client, Sample
from kvcomm.lab.load.workloads import Session, SessionTurn


class Sent(NamedTuple):
    """A request as it was sent, and what came of it."""

    messages: tuple[ChatMessage, ...]
    max_tokens: int
    sample: Sample


class LoadResult(NamedTuple):
    """A whole run: requests in the order in which they ended."""

    sent: tuple[Sent, ...]
    duration_s: float


Tell = Callable[[int], None]
"""Called after each request with the number that have ended."""


def run_load(client: Client, sessions: Sequence[Session], *, concurrency: int, tell: Tell) -> LoadResult:
    """Send all sessions; at most `concurrency` requests are open at once. A failed request ends its session's talk,
    not the session: what follows is sent without it."""
    with ThreadPoolExecutor(concurrency) as threads:
        return asyncio.run(_Run(client, threads, tell).all(sessions))


class _Run:
    def __init__(self, client: Client, threads: ThreadPoolExecutor, tell: Tell) -> None:
        self._client = client
        self._threads = threads
        self._tell = tell
        self._sent: list[Sent] = []
        self._start_s = time.perf_counter()

    async def all(self, sessions: Sequence[Session]) -> LoadResult:
        self._start_s = time.perf_counter()
        await asyncio.gather(*(self._session(session) for session in sessions))
        return LoadResult(tuple(self._sent), time.perf_counter() - self._start_s)

    async def _session(self, session: Session) -> None:
        said = session.opening
        for stage in session.stages:
            answers = await asyncio.gather(*(self._request(said, turn) for turn in stage))
            if session.is_conversation and len(stage) == 1 and answers[0].error is None:
                asked = {"role": "user", "content": stage[0].text}
                said = (*said, asked, {"role": "assistant", "content": answers[0].text})

    async def _request(self, said: tuple[ChatMessage, ...], turn: SessionTurn) -> Sample:
        await asyncio.sleep(self._start_s + turn.at_s - time.perf_counter())
        messages = (*said, {"role": "user", "content": turn.text})
        loop = asyncio.get_running_loop()
        sample = await loop.run_in_executor(self._threads, self._client.send, messages, turn.max_tokens)
        self._sent.append(Sent(messages, turn.max_tokens, sample))
        self._tell(len(self._sent))
        return sample
