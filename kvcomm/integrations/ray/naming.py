"""Named segments that replicas know which were not there when they were named.

Every replica is told of a new name; each writes the same object, of which one stays: a name's versions as they are by
then. A replica reads a tenant's names before the tenant's first request. Used from the event loop's thread; the store
is read and written in worker threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import replace
from functools import partial
from typing import Any

import anyio.to_thread

from kvcomm.errors import KVCommError
from kvcomm.integrations.ray.messages import ForwardedRequest
from kvcomm.integrations.ray.sealed import SealedObjects
from kvcomm.server.errors import ApiError
from kvcomm.server.segments.registry import NamedText
from kvcomm.server.state import ServerState

logger = logging.getLogger("kvcomm.ray")

SEGMENTS = "segments"
BRING_S = 5.0
"""Seconds that a tenant's first request waits for its names; then it goes on without those that have not come."""

PATH = re.compile(r"/v1/segments/([a-zA-Z0-9][a-zA-Z0-9._-]{0,63})")


class NameKeeper:
    """Keeps the names of one replica's tenants."""

    def __init__(self, state: ServerState, objects: SealedObjects) -> None:
        self._state = state
        self._objects = objects
        self._reading: dict[str, asyncio.Task[None]] = {}  # by tenant; done ones stay

    async def bring(self, asked: ForwardedRequest) -> None:
        """Read a tenant's names, the first time that it asks for something; later ones come by themselves."""
        tenant = asked.tenant
        if tenant is None or not self._objects.serves(tenant):
            return
        if tenant not in self._reading:
            self._reading[tenant] = asyncio.create_task(self._bring(tenant))
        if not self._reading[tenant].done():
            await asyncio.wait((self._reading[tenant],), timeout=BRING_S)

    async def keep(self, asked: ForwardedRequest) -> None:
        """Write what a request has changed about a name."""
        found = PATH.fullmatch(asked.path)
        tenant = asked.tenant
        if found is None or tenant is None or asked.method not in ("PUT", "DELETE") or not self._objects.serves(tenant):
            return
        try:
            versions = self._state.registries.of(tenant).versions(found[1])
        except ApiError:
            versions = ()
        try:
            await anyio.to_thread.run_sync(partial(self._write, tenant, found[1], versions))
        except KVCommError as error:
            logger.warning("segment %r is not kept for replicas to come: %s", found[1], error)

    async def _bring(self, tenant: str) -> None:
        try:
            names = await anyio.to_thread.run_sync(partial(self._read, tenant))
        except (KVCommError, TypeError, ValueError) as error:  # the latter two: of another version of kvcomm
            logger.warning("names of segments cannot be read: %s", error)
            return
        registry = self._state.registries.of(tenant)
        for versions in names:
            registry.bring_back(versions)

    def _write(self, tenant: str, name: str, versions: tuple[NamedText, ...]) -> None:
        folder = self._objects.folder(tenant, SEGMENTS, self._state.engine.namespace(), name)
        kept = f"{folder}{versions[-1].version:010d}" if versions else None
        if kept is not None:
            content = json.dumps([_values(each) for each in versions]).encode()
            self._objects.put(tenant, kept, content)
        for each in self._objects.names(folder):
            if each != kept:
                self._objects.clear(each)

    def _read(self, tenant: str) -> list[tuple[NamedText, ...]]:
        folder = self._objects.folder(tenant, SEGMENTS, self._state.engine.namespace())
        latest: dict[str, tuple[NamedText, ...]] = {}
        for name in sorted(self._objects.names(folder)):
            content = self._objects.get(tenant, name)
            if content is not None:
                versions = tuple(_text(values) for values in json.loads(content))
                latest[versions[-1].name] = versions
        return list(latest.values())


def _values(text: NamedText) -> dict[str, Any]:
    return {**vars(replace(text)), "token_ids": list(text.token_ids)}


def _text(values: dict[str, Any]) -> NamedText:
    return NamedText(**values)
