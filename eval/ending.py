"""Runs that are told to end leave nothing behind: servers that they started end, and temporary files go."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end the process as `sys.exit(1)` does, by way of every `with` and `finally`.

    Only for the main thread, as no other may set signal handlers.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def temporary_files_in(folder: str | Path) -> dict[str, str]:
    """Environment variables for a process that may be killed: its temporary files go with this folder.

    What torch compiles stays where it is kept for all processes.
    """
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}
