"""Things in a folder that are no regular files."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPECIAL = ("fifo", "socket", "folder", "device")


@contextmanager
def make_special(file: Path, kind: str) -> Iterator[Path]:
    """Put such a thing in a file's place; reading a FIFO or this device would never end."""
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            here = os.getcwd()
            os.chdir(file.parent)  # names of sockets are short
            try:
                listening.bind(file.name)
            finally:
                os.chdir(here)
            listening.listen()
            yield file
        return
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    yield file
