"""Running an app under uvicorn: its limits, its drain, and where it listens."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvcomm.server.protocol import MAX_HEADER_BYTES, limited_protocol
from kvcomm.server.removal import remove_revoked
from kvcomm.server.state import ServerState

TICKS_PER_S = 10


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: not ready, no new requests; those in flight end by themselves, for a while at most."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], None],
        tick: Callable[[], Awaitable[None]],
        prepare: Callable[[], None],
    ) -> None:
        """Make one.

        Args:
            tick: is called about once a second.
            prepare: is called once it listens, in a thread of its own: what requests would else have to wait for.
        """
        super().__init__(config)
        self._drain = drain
        self._tick = tick
        self._prepare = prepare

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and to prepare beside it."""
        await super().startup(sockets)
        threading.Thread(target=self._prepare, name="kvcomm-prepare", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's own bookkeeping, ten times a second."""
        if counter % TICKS_PER_S == 0:
            await self._tick()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second SIGINT ends at once. `run` then returns: the process ends by itself, not by it."""
        self._drain()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def make_server(app: FastAPI) -> DrainingServer:
    """The server of an app made by `make_app`. Where the log goes is the process's matter: see `logging_config`.

    Raises:
        InvalidRequest: it would listen where others can reach it, without keys.
    """
    state = app.state.kvcomm
    assert isinstance(state, ServerState)
    settings = state.settings
    settings.require_safe_address(has_keys=state.keys is not None)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=limited_protocol(settings.header_timeout_s, settings.max_connections),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,  # half of it by default, where headers come in pieces
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )
    return DrainingServer(config, state.admission.drain, partial(tick, state), state.engine.grammars.prepare)


async def tick(state: ServerState) -> None:
    """Let go of what has expired, and of what tenants without keys had; for about once a second."""
    await state.contexts.sweep()
    await remove_revoked(state)
