"""The app without Ray: replicas in this process, asked as Ray would ask them, and an ingress before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.integrations.ray.choosing import ReplicaChooser
from kvcomm.integrations.ray.ingress import ReplicaDied, make_ingress
from kvcomm.integrations.ray.keeping import ContextKeeper
from kvcomm.integrations.ray.messages import AnswerPart, ForwardedRequest, Head, Whole
from kvcomm.integrations.ray.naming import NameKeeper
from kvcomm.integrations.ray.pinning import PinnedIds
from kvcomm.integrations.ray.records import ContextRecords
from kvcomm.integrations.ray.sealed import SealedObjects
from kvcomm.integrations.ray.serving import Serving
from kvcomm.server.app import make_app
from kvcomm.server.settings import ServerSettings
from kvcomm.tiers.opening import open_store
from tests.limits import PATIENCE_S
from tests.tiny import TinyModel

SMALL = EngineConfig(page_size=4, pool_tokens=4096, max_batch_tokens=64, prefill_chunk=16)
MODEL = "tiny"

Dies = Callable[[ForwardedRequest, AnswerPart | None], bool]
"""Whether a replica dies of a request: before anything was said (None), or before it says this part."""


class Replica:
    """One engine and its server; `died` is what a kill leaves."""

    def __init__(
        self, name: str, tiny: TinyModel, settings: ServerSettings, tier: Path | None, secret: bytes | None
    ) -> None:
        self.name = name
        self.engine = Engine(tiny.model, tiny.tokenizer, config=SMALL)
        self.serving = Serving(make_app(self.engine, settings, new_id=PinnedIds(name)), name)
        if tier is not None:
            objects = SealedObjects(open_store(str(tier)), secret)
            records = ContextRecords(objects, self.engine.namespace())
            self.serving.keeper = ContextKeeper(self.serving.state, records)
            self.serving.names = NameKeeper(self.serving.state, objects)
        self.asked: list[ForwardedRequest] = []


class LocalReplicas:
    """`Replicas` of this process, with the router's own choice. Replicas die when a test says so."""

    def __init__(self) -> None:
        self.living: dict[str, Replica] = {}
        self.dead: list[Replica] = []
        self.chooser = ReplicaChooser()
        self.dies: Dies = lambda asked, part: False

    async def one(self, asked: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """See `Replicas`."""
        stats = {name: each.serving.stats() for name, each in self.living.items()}
        if not (order := self.chooser.order(asked, stats, {})):
            raise ReplicaDied
        replica = self.living[order[0]]
        self.chooser.sent(asked, replica.name)
        replica.asked.append(asked)
        if self.dies(asked, None):
            self.kill(replica.name)
            raise ReplicaDied
        async with aclosing(replica.serving.parts(asked)) as parts:
            async for part in parts:
                if self.dies(asked, part):
                    self.kill(replica.name)
                    raise ReplicaDied
                yield part

    async def every(self, asked: ForwardedRequest) -> list[Whole]:
        """See `Replicas`."""
        return list(await asyncio.gather(*(each.serving.whole(asked) for each in self.living.values())))

    def kill(self, name: str) -> None:
        """A replica is gone, with all it has."""
        self.dead.append(self.living.pop(name))
        self.chooser.forget(name)

    def holder_of(self, context_id: str) -> list[str]:
        """Replicas that have a context."""
        return [
            name
            for name, each in self.living.items()
            for tenant in each.serving.state.tenants.names
            if (registry := each.serving.state.contexts.find(tenant)) is not None
            and any(node.id == context_id for node in registry.nodes)
        ]


class Cluster:
    """An app of several replicas, and a client of it."""

    def __init__(self, tiny: TinyModel, settings: ServerSettings, tier: Path | None, secret: bytes | None) -> None:
        self._tiny = tiny
        self._settings = settings
        self._tier = tier
        self._secret = secret
        self.replicas = LocalReplicas()

    def add(self, name: str) -> Replica:
        """One more replica."""
        made = Replica(name, self._tiny, self._settings, self._tier, self._secret)
        self.replicas.living[name] = made
        return made

    def client(self) -> TestClient:
        """Of a new ingress, which knows nothing of what others have seen."""
        app = make_ingress(self._settings, self.replicas)
        return TestClient(app, base_url="http://localhost", client=("127.0.0.1", 50_000))

    def close(self) -> None:
        """End every engine; what is in flight would be a fault of the test's."""
        for each in (*self.replicas.living.values(), *self.replicas.dead):
            assert each.engine.wait_idle(PATIENCE_S)
            each.serving.state.contexts.close()
            each.engine.check_integrity()
            each.engine.close()


@contextmanager
def cluster(
    tiny: TinyModel, *names: str, tier: Path | None = None, secret: bytes | None = None, **settings: object
) -> Iterator[Cluster]:
    """A cluster of replicas with these names."""
    made = Cluster(tiny, ServerSettings(model=MODEL, **settings), tier, secret)  # type: ignore[arg-type]
    try:
        for name in names:
            made.add(name)
        yield made
    finally:
        made.close()


def is_head(part: AnswerPart | None) -> bool:
    """Whether a part begins an answer."""
    return isinstance(part, Head)
