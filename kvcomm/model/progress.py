"""Progress of long steps on stderr, and silence for the libraries that would talk over it.

A `Reporter` shows bars on a terminal, plain lines elsewhere, and nothing unless it was asked to. It owns its
own output only; `quiet_transformers` puts every setting of transformers back as it found it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Update = Callable[[int], None]
"""Takes what is done so far, in the unit of the stage's total."""


class Reporter:
    """Shows stages one after another.

    Args:
        enabled: False shows nothing at all.
    """

    def __init__(self, *, enabled: bool) -> None:
        # Bound to today's stderr: a stage may redirect sys.stderr to silence a library.
        self._console = Console(file=sys.stderr, quiet=not enabled, highlight=False)
        self._bars = enabled and self._console.is_terminal

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, text: str, total: int | None = None) -> Iterator[Update]:
        """Show one step while the block runs; `total` None means of unknown length."""
        if not self._bars:
            self.line(text)
            yield _ignore
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(text, total=total)
            yield lambda done: bars.update(task, completed=done)
            bars.update(task, total=total or 1, completed=total or 1)


def _ignore(_done: int) -> None:
    pass


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers to errors and, unless `bars`, without progress bars; both are put back afterwards."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
