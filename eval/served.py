"""An engine of this process behind a real server, for evaluations that look at both."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcomm import Engine


@contextmanager
def served(engine: Engine, *, keys: Path | None = None) -> Iterator[tuple[int, str]]:
    """A server on a free port of this machine: the port, and what it calls the model; `keys` is a key file."""
    from kvcomm.server import ServerSettings, bind, make_app, make_server

    settings = ServerSettings(port=0, keys=keys, log_level="error")
    listener = bind(settings)
    server = make_server(make_app(engine, settings))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield listener.getsockname()[1], settings.name
    finally:
        server.should_exit = True
        thread.join()
