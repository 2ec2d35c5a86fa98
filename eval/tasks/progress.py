"""How far a run has come: a bar with the time left for every phase, or a line now and then where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 30.0
"""Seconds between lines."""


class Phases:
    """Phases of a run, on stderr; one after the other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bars = None
        if console.is_terminal:
            self._bars = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
        self._clock = clock

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A phase of `total` steps; gives what is to be told how many more are done."""
        if self._bars is not None:
            bar = self._bars.add_task(title, total=total)
            yield lambda count: self._bars.advance(bar, count) if self._bars is not None else None
            return
        lines = _Lines(title, total, self._clock)
        yield lines.advance
        lines.end()


class _Lines:
    """Lines about one phase."""

    def __init__(self, title: str, total: int, clock: Callable[[], float]) -> None:
        self._title, self._total, self._clock = title, total, clock
        self._done = self._before = 0
        self._began_s = self._told_s = clock()

    def advance(self, count: int) -> None:
        """That many more steps are done. What is done at once was done by an earlier run and says nothing of speed."""
        now = self._clock()
        if not self._done and count > 1:
            self._before = count
        self._done += count
        fresh = self._done - self._before
        if fresh and now - self._told_s >= EVERY_S:
            left_s = (now - self._began_s) / fresh * (self._total - self._done)
            self._told_s = now
            _tell(f"{self._title}: {self._done} of {self._total}, about {_duration(left_s)} left")

    def end(self) -> None:
        """The phase is over."""
        _tell(f"{self._title}: {self._done} of {self._total} after {_duration(self._clock() - self._began_s)}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
