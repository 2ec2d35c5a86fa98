"""The two Ray Serve deployments: engines, and the ingress before them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from logging.config import dictConfig
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, TaskCancelledError
from ray.serve import get_replica_context
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcomm.engine.engine import Engine
from kvcomm.integrations.ray.ingress import ReplicaDied, make_ingress
from kvcomm.integrations.ray.keeping import ContextKeeper
from kvcomm.integrations.ray.learning import LearningExchange
from kvcomm.integrations.ray.messages import AnswerPart, ForwardedRequest, Whole
from kvcomm.integrations.ray.naming import NameKeeper
from kvcomm.integrations.ray.pinning import PinnedIds
from kvcomm.integrations.ray.records import ContextRecords
from kvcomm.integrations.ray.sealed import SealedObjects
from kvcomm.integrations.ray.serving import Serving
from kvcomm.integrations.ray.settings import AppSettings
from kvcomm.server.logs import logging_config
from kvcomm.server.settings import ServerSettings
from kvcomm.server.state import ServerState
from kvcomm.tiers.keys import read_secret
from kvcomm.tiers.opening import open_store
from kvcomm.tiers.space import DEFAULT_TENANT

logger = logging.getLogger("kvcomm.ray")

DIED = (ActorDiedError, ActorUnavailableError, RayActorError)
FOLLOW_S = 1.0
LEARN_S = 30.0
"""Between two times that replicas tell one another what they have learned."""

SWITCH_S = 0.0005
"""As `kvcomm serve` sets it: how long a thread keeps the interpreter while others want it."""


class EngineReplica:
    """One engine with the whole server over it."""

    def __init__(self, settings: AppSettings, server: ServerSettings) -> None:
        """Loads the model, which takes a while.

        Raises:
            KVCommError: the model, the keys or the tier cannot be used; says why.
        """
        import torch

        from kvcomm.server.app import make_app

        dictConfig(logging_config(server.log_level))
        sys.setswitchinterval(SWITCH_S)
        torch.set_num_threads(settings.num_threads)
        name = get_replica_context().replica_id.unique_id
        self._tier = server.open_tier()
        self._engine = Engine.load(
            server.model, dtype=server.dtype, device=server.device, config=server.engine, tier=self._tier
        )
        for adapter, folder in server.adapters.items():
            self._engine.adapters.load(adapter, folder)
        app = make_app(self._engine, server, new_id=PinnedIds(name))
        self._serving = Serving(app, name)
        objects = _objects(server)
        self._exchange: LearningExchange | None = None
        if objects is not None:
            state = self._serving.state
            self._serving.keeper = ContextKeeper(state, ContextRecords(objects, self._engine.namespace()))
            self._serving.names = NameKeeper(state, objects)
            self._exchange = LearningExchange(self._engine, objects, name, partial(_tenants, state))
        self._following: asyncio.Task[None] | None = None
        gc.collect()
        gc.freeze()

    async def parts(self, asked: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """The answer to a request; a streaming call."""
        async with aclosing(self._serving.parts(asked)) as parts:
            async for part in parts:
                yield part

    async def whole(self, asked: ForwardedRequest) -> Whole:
        """The same in one piece."""
        return await self._serving.whole(asked)

    async def process(self) -> tuple[str, int]:
        """Its name, and the id of the process that it is."""
        return get_replica_context().replica_id.unique_id, os.getpid()

    async def record_routing_stats(self) -> dict[str, Any]:
        """For the router; Ray asks for it again and again."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow())
        return self._serving.stats()

    async def check_health(self) -> None:
        """Raises EngineClosed when Ray should put another replica in this one's place."""
        self._serving.require_health()

    async def __del__(self) -> None:
        """Ray has waited for what was in flight, and ends the process."""
        if self._following is not None:
            self._following.cancel()
        await self._serving.drain()
        await asyncio.to_thread(self._engine.close)
        if self._tier is not None:
            await asyncio.to_thread(self._tier.close)

    async def _follow(self) -> None:
        """What a server does about once a second; one failure is no reason to stop."""
        exchanged_s = -LEARN_S
        while True:
            try:
                await self._serving.follow()
                if self._exchange is not None and time.monotonic() - exchanged_s >= LEARN_S:
                    exchanged_s = time.monotonic()
                    await asyncio.to_thread(self._exchange.exchange)
            except Exception:
                logger.exception("what is done once a second failed")
            await asyncio.sleep(FOLLOW_S)


def _objects(server: ServerSettings) -> SealedObjects | None:
    if server.tier is None:
        return None
    secret = None if server.tier_secret_file is None else read_secret(server.tier_secret_file)
    return SealedObjects(open_store(server.tier), secret)


def _tenants(state: ServerState) -> list[str]:
    """Everybody whose learning may be shared."""
    return sorted({*state.tenants.names, *state.tenants.with_keys, *([DEFAULT_TENANT] if state.keys is None else [])})


class Ingress:
    """Takes HTTP requests from Ray's proxy."""

    def __init__(self, engines: DeploymentHandle, server: ServerSettings) -> None:
        """Raises KeyFileError when the key file cannot be read."""
        dictConfig(logging_config(server.log_level))
        self._app = make_ingress(server, _RayReplicas(engines))

    async def __call__(self, request: Request) -> Response:
        """Ray runs what it gets as an ASGI app."""
        return _AppResponse(self._app)


class _AppResponse(Response):
    """An ASGI app in the place of a response: the request's scope is the one that it was made from."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, **_below(scope), "state": {}}, receive, send)


def _below(scope: Scope) -> dict[str, Any]:
    """A request's path behind the prefix that Ray routes by, as the server knows its paths."""
    root, path, raw = scope.get("root_path", "").rstrip("/"), scope["path"], scope.get("raw_path") or b""
    if not path.startswith(f"{root}/"):
        return {}
    return {"path": path[len(root) :], "raw_path": raw.removeprefix(root.encode()), "root_path": ""}


class _RayReplicas:
    """`Replicas` behind a handle of Ray's."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._streaming = engines.options(stream=True)
        self._engines = engines

    async def one(self, asked: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """See `Replicas`."""
        response = self._streaming.parts.remote(asked)
        try:
            async for part in response:
                yield part
        except DIED as error:
            raise ReplicaDied from error
        finally:
            with suppress(TaskCancelledError, *DIED):
                response.cancel()

    async def every(self, asked: ForwardedRequest) -> list[Whole]:
        """See `Replicas`."""
        results = await self._engines.broadcast("whole", asked).results_async(return_exceptions=True)
        return [each for each in results if isinstance(each, Whole)]
