"""One replica's server: the app of `kvcomm.server` over one engine, asked by messages; knows nothing about Ray.

Before a request for a context that is not here reaches the app, the context is brought back, if somebody kept it;
before the last part of an answer leaves, the contexts that changed are kept. So whoever has been told of a change finds
it again, whichever replica dies.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from kvcomm.integrations.ray.holding import Holding
from kvcomm.integrations.ray.keeping import ContextKeeper
from kvcomm.integrations.ray.messages import AnswerPart, ForwardedRequest, Head, Tail, Whole, answer
from kvcomm.integrations.ray.naming import NameKeeper
from kvcomm.server.errors import ApiError
from kvcomm.server.running import tick
from kvcomm.server.state import ServerState

REPLICA = b"x-kvcomm-replica"
"""Header of answers: who gave it."""


class Serving:
    """What a replica does with requests. Used from one event loop.

    Attributes:
        holding: what it tells routers.
        keeper: of contexts; None: they end with their replica.
        names: of segments; None: a replica knows those that it was told of.
    """

    def __init__(self, app: FastAPI, replica: str, keeper: ContextKeeper | None = None) -> None:
        """`replica` is its name."""
        self._app = app
        self._replica = replica
        self.keeper = keeper
        self.names: NameKeeper | None = None
        self.holding = Holding()

    @property
    def state(self) -> ServerState:
        """The server's state."""
        state = self._app.state.kvcomm
        assert isinstance(state, ServerState)
        return state

    async def parts(self, asked: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """The answer to a request. Leaving early is the client's disconnect."""
        is_served = False
        heads: list[Head] = []  # held back until something follows, so that a death before leaves another a try
        self.holding.begin(asked.wanted)
        try:
            async with aclosing(self._messages(asked)) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        is_served = message["status"] < 300
                        heads.append(self._head(message))
                        continue
                    is_last = not message.get("more_body", False)
                    tail = await self._kept(asked) if is_last else None
                    while heads:
                        yield heads.pop()
                    if message.get("body"):
                        yield message["body"]
                    if tail is not None:
                        yield tail
        finally:
            self.holding.end(asked.wanted, is_served=is_served)

    async def whole(self, asked: ForwardedRequest) -> Whole:
        """The same in one piece."""
        head, body = Head(500, []), b""
        async with aclosing(self.parts(asked)) as parts:
            async for part in parts:
                if isinstance(part, Head):
                    head = part
                elif isinstance(part, bytes):
                    body += part
        return Whole(self._replica, head.status, head.headers, body)

    async def follow(self) -> None:
        """To be called about once a second: what has expired goes, here and where it is kept."""
        await tick(self.state)
        if self.keeper is not None:
            await self.keeper.follow()

    def stats(self) -> dict[str, Any]:
        """For routers."""
        return self.holding.stats()

    def require_health(self) -> None:
        """Raises EngineClosed when the process should be replaced."""
        self.state.engine.require_open()

    async def drain(self) -> None:
        """Start nothing any more, and keep what is to outlive the replica."""
        self.state.admission.drain()
        if self.keeper is not None:
            await self.keeper.close()

    def _head(self, message: Message) -> Head:
        headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
        return Head(message["status"], [*headers, (REPLICA, self._replica.encode())])

    async def _messages(self, asked: ForwardedRequest) -> AsyncGenerator[Message, None]:
        try:
            if self.names is not None:
                await self.names.bring(asked)
            if self.keeper is not None and asked.context_id is not None:
                family = await self.keeper.recall(asked)
                if family is not None:
                    self.holding.take_over(family)
        except ApiError as error:
            async for message in answer(error.response(), asked):
                yield message
            return
        async with aclosing(answer(self._app, asked)) as messages:
            async for message in messages:
                yield message

    async def _kept(self, asked: ForwardedRequest) -> Tail:
        if self.names is not None:
            await self.names.keep(asked)
        return Tail({} if self.keeper is None else await self.keeper.keep(asked))
