"""The thread that tells the world about the radix tree: takes its events, and publishes what they mean.

It holds the engine's lock only to take what has been recorded; names of blocks are computed and bytes are sent without
it. Where the tree's own log has overflowed, or namespaces have come to stand for something else (an adapter, other
weights), it begins again from the tree.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from kvcomm.engine.engine import Engine
from kvcomm.errors import UnknownAdapter, UnsupportedModel, WeightsChanged
from kvcomm.memory.events import CacheEvent, EventKind
from kvcomm.server.kv_events.announcer import AllCleared, Announcer, KVEvent
from kvcomm.server.kv_events.blocks import Owner
from kvcomm.server.kv_events.publisher import Publisher
from kvcomm.server.kv_events.settings import KVEventSettings
from kvcomm.server.kv_events.wire import Encoder
from kvcomm.tiers.space import DEFAULT_TENANT

TICK_S = 0.05
"""Between looks at the tree."""
MAX_SEEN = 4096
"""Namespaces that are remembered, most of them of tenants and salts that are not announced."""


class KVEventFeed:
    """Publishes what an engine's tree holds, while a `with` statement lasts."""

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        announcer: Announcer,
        encoder: Encoder,
        owners: Callable[[], Mapping[str, Owner]],
    ) -> None:
        """Make one.

        Args:
            publisher: the caller's to close, afterwards.
            owners: whose blocks to announce now, by namespace.
        """
        self._engine = engine
        self._publisher = publisher
        self._announcer = announcer
        self._encoder = encoder
        self._find_owners = owners
        self._owners: Mapping[str, Owner] = {}
        self._seen: set[str] = set()  # namespaces whether they have an owner or not
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcomm-kv-events", daemon=True)

    def __enter__(self) -> Self:
        self._begin()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_ending.set()
        self._thread.join()

    def step(self) -> None:
        """Publish what has happened since the last time; nothing where nothing has."""
        if not self._engine.cache.has_events:
            return
        events = self._engine.cache.take_events()
        is_lost = any(event.kind is EventKind.LOST for event in events)
        unseen = {event.namespace for event in events} - self._seen
        before = self._owners
        if is_lost or unseen:
            self._ask_for_owners(unseen)
        if is_lost or self._owners != before:
            self._begin_again()
        else:
            self._publish(self._announcer.announce(events, self._owners))

    def _ask_for_owners(self, unseen: Iterable[str]) -> None:
        """Where there is a namespace that nobody has seen, those that had an owner may be nobody's any more."""
        self._owners = self._find_owners()
        if len(self._seen) > MAX_SEEN:
            self._seen.clear()
        self._seen.update(self._owners, unseen)

    def _run(self) -> None:
        while not self._is_ending.is_set():
            self.step()
            if self._publisher.can_be_asked:
                self._publisher.wait(TICK_S)
            else:
                self._is_ending.wait(TICK_S)
        self.step()

    def _begin(self) -> None:
        """Whoever knew a former process at this address forgets what that had."""
        self._publish([AllCleared()])
        self._ask_for_owners(())
        self._begin_again()

    def _begin_again(self) -> None:
        self._publish(self._announcer.begin_again(self._all_stored(), self._owners))

    def _all_stored(self) -> list[CacheEvent]:
        return self._engine.cache.begin_events()

    def _publish(self, events: Sequence[KVEvent]) -> None:
        if events:
            self._publisher.publish(self._encoder.batch(events, time.time()))


def open_publisher(settings: KVEventSettings, model: str) -> Publisher:
    """The sockets, before there is an engine.

    Args:
        model: what clients call it.

    Raises:
        MissingExtra, InvalidRequest: see `Publisher`.
    """
    topic = f"kv@{socket.gethostname()}@{model}" if settings.topic is None else settings.topic
    return Publisher(settings.url, topic=topic, form=settings.format, replay=settings.replay)


def make_feed(
    engine: Engine,
    publisher: Publisher,
    settings: KVEventSettings,
    *,
    has_keys: bool,
    adapters: Mapping[str, Path] | None = None,
) -> KVEventFeed:
    """What publishes about an engine.

    Args:
        has_keys: then only the tenants in the settings are announced.
        adapters: where those with these names were loaded from.
    """
    tenants = dict(settings.tenants) if has_keys else {DEFAULT_TENANT: "", **settings.tenants}
    medium = "CPU" if engine.model.device.type == "cpu" else "GPU"
    return KVEventFeed(
        engine,
        publisher,
        Announcer(settings.block_size, settings.seed),
        Encoder(settings.format, block_size=settings.block_size, medium=medium),
        partial(owners_of, engine, tenants, adapters or {}),
    )


def owners_of(engine: Engine, salts: Mapping[str, str], adapters: Mapping[str, Path]) -> dict[str, Owner]:
    """Whose blocks to announce, by the namespaces that tenants have now, with and without each adapter.

    Args:
        salts: of the tenants.
        adapters: where they were loaded from, as far as that is known.
    """
    owners: dict[str, Owner] = {}
    for tenant, salt in salts.items():
        for adapter in (None, *engine.adapters.names):
            path = "" if adapter is None else str(adapters.get(adapter, ""))
            with suppress(UnknownAdapter, WeightsChanged, UnsupportedModel):  # nothing can be computed with these now
                owners.setdefault(engine.namespace(tenant, adapter=adapter), Owner(salt, adapter or "", path))
    return owners
