"""Contexts that outlive their replica: kept when they change, brought back when they are asked for elsewhere.

What the registries hold is compared with what was last kept, so that the server itself knows nothing of this. Used from
the event loop's thread; the store is read and written in worker threads. A store that cannot be written costs the
durability of what was not written and no answer: a replica that then dies leaves an older version, which is refused to
whoever has seen a newer one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import anyio.to_thread

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.request import ANSWER
from kvcomm.errors import KVCommError
from kvcomm.integrations.ray.messages import ForwardedRequest
from kvcomm.integrations.ray.pinning import pin_of
from kvcomm.integrations.ray.records import ContextRecord, ContextRecords
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.contexts.conversation import KeptConversation
from kvcomm.server.contexts.kept_response import KeptResponse
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import TenantContext
from kvcomm.server.errors import ApiError, translate
from kvcomm.server.state import ServerState
from kvcomm.server.tenants import Tenant
from kvcomm.server.waiting import in_thread

logger = logging.getLogger("kvcomm.ray")

KEEP_S = 2.0
"""Seconds that an answer waits for what it has changed to be kept."""

CHANGING = ("/v1/contexts", "/v1/responses", "/v1/snapshots")
"""Beginnings of paths where contexts come to be and end."""

REFRESH_SHARE = 0.1
"""Of a context's life, after which its last use is written anew."""


class _Stamp(NamedTuple):
    """What tells two states of a context apart."""

    num_tokens: int
    name: str | None
    is_pinned: bool
    ttl_s: float
    is_spare: bool


class _Kept(NamedTuple):
    """What was kept of a context last, and when it had been used then, on the server's clock."""

    stamp: _Stamp
    version: int
    used_s: float


class ContextKeeper:
    """Keeps the contexts of one replica."""

    def __init__(self, state: ServerState, records: ContextRecords, *, now: Callable[[], float] = time.time) -> None:
        self._state = state
        self._records = records
        self._now = now
        self._kept: dict[str, dict[str, _Kept]] = {}  # tenant -> context -> what was kept
        self._keeping: dict[str, asyncio.Lock] = {}  # by tenant
        self._coming: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by family
        self._changing: dict[str, str] = {}  # nonce of the request that changes a context now, by context
        self._writes: set[asyncio.Task[dict[str, int]]] = set()

    async def keep(self, asked: ForwardedRequest) -> dict[str, int]:
        """Write what a request has changed; returns the versions of that, by id.

        Where the store takes longer than `KEEP_S` the writing goes on, and nothing is returned.
        """
        if asked.tenant is None or not (asked.context_id or asked.path.startswith(CHANGING)):
            return {}
        writing = asyncio.create_task(self._keep(asked.tenant))
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)
        done, _ = await asyncio.wait((writing,), timeout=KEEP_S)
        if asked.changes and asked.context_id is not None and done:
            self._changing.pop(asked.context_id, None)
        return writing.result() if done else {}

    async def follow(self) -> None:
        """Write and remove what time has changed."""
        for tenant in list(self._state.tenants.names):
            await self._keep(tenant)

    async def close(self) -> None:
        """Keep everything a last time; nothing is removed any more."""
        await asyncio.gather(*self._writes)
        for tenant in list(self._state.tenants.names):
            await self._keep(tenant, removes=False)

    async def recall(self, asked: ForwardedRequest) -> str | None:
        """Bring back the context that a request is about, if it was kept and is not here; returns its family then.

        Raises:
            ApiError: 409 where only an older version of it was kept than its client has seen, 503 where there is no
                room for it or the store cannot be read.
        """
        assert asked.context_id is not None, "the request is about a context"
        context_id = f"ctx_{asked.context_id.partition('_')[2]}"
        tenant, pin = asked.tenant, pin_of(context_id)
        if asked.changes:
            self._changing[context_id] = asked.nonce
        if tenant is None or pin is None or not self._records.serves(tenant):
            return None
        lock = self._coming.setdefault(pin.family, asyncio.Lock())
        async with lock:
            is_back = await self._recall(self._state.tenants.get(tenant), context_id, asked)
        return pin.family if is_back else None

    async def _recall(self, tenant: Tenant, context_id: str, asked: ForwardedRequest) -> bool:
        registry = self._state.contexts.of(tenant)
        registry.sweep()
        kept = self._kept.get(tenant.name, {}).get(context_id)
        if any(node.id == context_id for node in registry.nodes):
            if kept is None or asked.version is None or kept.version >= asked.version:
                return False
            await self._drop(registry, context_id)
        elif kept is not None:  # it was deleted here, or has expired
            await self._keep(tenant.name)
            return False
        record = await self._read(tenant.name, context_id)
        if record is not None and asked.is_again and record.nonce == asked.nonce:
            record = await self._read(tenant.name, context_id, at=record.version - 1)
        if record is None:
            return False
        if asked.version is not None and record.version < asked.version:
            raise _behind(context_id)
        await self._bring_back(registry, record)
        if asked.method in ("GET", "DELETE"):  # these are about the whole family
            await self._bring_family(registry, record)
        return True

    async def _bring_family(self, registry: ContextRegistry, record: ContextRecord) -> None:
        names = await anyio.to_thread.run_sync(partial(self._records.family, record.tenant, record.id))
        for name in names:
            other = await self._read(record.tenant, name)
            if other is not None:
                await self._bring_back(registry, other)

    async def _bring_back(self, registry: ContextRegistry, record: ContextRecord) -> None:
        """Parents first, so that children find their KV in the cache."""
        here = {node.id for node in registry.nodes}
        path = [record]
        while (parent := path[-1].parent) is not None and parent not in here | {each.id for each in path}:
            above = await self._read(record.tenant, parent)
            if above is None:
                break
            path.append(above)
        for each in reversed(path):
            if each.id not in here:
                await self._make(registry, each)

    async def _make(self, registry: ContextRegistry, record: ContextRecord) -> None:
        tenant = registry.tenant
        space = self._state.tenants.open_namespace(tenant, record.salt)
        made: list[TenantContext] = []
        with registry.place():
            try:
                await in_thread(lambda: made.append(_made(self._state, record, space)))
            except KVCommError as error:
                raise translate(error) from error
            except BaseException:  # cancelled: nobody will have what was made meanwhile
                for node in made:
                    node.release()
                raise
            (node,) = made
            registry.bring_back(node, record.parent)
        self._note(tenant.name, node, record.version)

    async def _read(self, tenant: str, context_id: str, *, at: int | None = None) -> ContextRecord | None:
        try:
            record = await anyio.to_thread.run_sync(partial(self._records.get, tenant, context_id, at=at))
        except KVCommError as error:
            message = f"what was kept of {context_id} cannot be read now; try again"
            raise ApiError(503, "tier_failed", message, retry_after_s=1) from error
        if record is not None and record.is_expired(self._now()):
            await self._remove(tenant, context_id)
            return None
        return record

    async def _keep(self, tenant: str, *, removes: bool = True) -> dict[str, int]:
        registry = self._state.contexts.find(tenant)
        if not self._records.serves(tenant) or (registry is None and tenant not in self._kept):
            return {}
        versions: dict[str, int] = {}
        async with self._keeping.setdefault(tenant, asyncio.Lock()):
            kept = self._kept.setdefault(tenant, {})
            nodes = {} if registry is None else {node.id: node for node in registry.nodes}
            for node in nodes.values():
                before = kept.get(node.id)
                if before is not None and before.stamp == _stamp(node) and not _is_stale(node, before):
                    continue
                version = 1 if before is None else before.version + 1
                record = self._recorded(node, tenant, version)
                is_written = await self._write(record)
                if is_written:
                    self._note(tenant, node, version, stamp=_stamp_of(record))
                    versions[node.id] = version
                elif is_written is False and registry is not None:
                    await self._drop(registry, node.id)
            for gone in kept.keys() - nodes.keys() if removes else ():
                del kept[gone]
                await self._remove(tenant, gone)
        return versions

    async def _write(self, record: ContextRecord) -> bool | None:
        """Whether it is written; False: another replica has changed the context, None: the store failed."""
        try:
            is_ours = await anyio.to_thread.run_sync(partial(self._records.put, record))
        except KVCommError as error:
            logger.warning("context %s is not kept: %s", record.id, error)
            return None
        if not is_ours:
            logger.error("context %s was changed by another replica meanwhile: this copy of it ends", record.id)
        return is_ours

    async def _remove(self, tenant: str, context_id: str) -> None:
        try:
            await anyio.to_thread.run_sync(partial(self._records.remove, tenant, context_id))
        except KVCommError as error:
            logger.warning("what was kept of context %s stays: %s", context_id, error)

    async def _drop(self, registry: ContextRegistry, context_id: str) -> None:
        """Let go of a copy that another replica has gone beyond."""
        gone = [node for node in registry.nodes if node.id == context_id]
        registry.remove(gone)
        self._kept.get(registry.tenant.name, {}).pop(context_id, None)
        for node in gone:
            await anyio.to_thread.run_sync(node.release)

    def _note(self, tenant: str, node: TenantContext, version: int, *, stamp: _Stamp | None = None) -> None:
        self._kept.setdefault(tenant, {})[node.id] = _Kept(stamp or _stamp(node), version, node.used_s)

    def _recorded(self, node: TenantContext, tenant: str, version: int) -> ContextRecord:
        context = node.context
        segments = [(each.name, each.token_ids) for each in context.segments]
        num_told = sum(len(token_ids) for _, token_ids in segments)
        if context.num_tokens > num_told:
            segments.append((ANSWER, context.tokens[num_told:]))
        return ContextRecord(
            id=node.id,
            version=version,
            nonce=self._changing.get(node.id, ""),
            tenant=tenant,
            namespace=self._state.engine.namespace(),
            name=node.name,
            salt=node.salt,
            adapter=context.adapter,
            parent=None if node.parent is None else node.parent.id,
            num_inherited=node.num_inherited,
            is_pinned=node.is_pinned,
            is_spare=node.is_spare,
            ttl_s=node.ttl_s,
            used_s=self._now() - (self._state.clock() - node.used_s),
            created=node.created,
            segments=tuple(segments),
            note=None if node.conversation is None else node.conversation.note(),
            response=None if node.response is None else json.dumps(node.response.read()),
        )


def _stamp(node: TenantContext) -> _Stamp:
    return _Stamp(node.context.num_tokens, node.name, node.is_pinned, node.ttl_s, node.is_spare)


def _stamp_of(record: ContextRecord) -> _Stamp:
    num_tokens = sum(len(token_ids) for _, token_ids in record.segments)
    return _Stamp(num_tokens, record.name, record.is_pinned, record.ttl_s, record.is_spare)


def _is_stale(node: TenantContext, kept: _Kept) -> bool:
    """Whether what was kept says too early a time of the last use."""
    return not node.is_pinned and node.used_s - kept.used_s > REFRESH_SHARE * node.ttl_s


def _made(state: ServerState, record: ContextRecord, space: str) -> TenantContext:
    """The context of a record, computed exactly, or taken from the cache or the tier; for a worker thread."""
    conversation = KeptConversation.from_note(record.note)
    context = _computed(state.engine, record, space)
    return TenantContext(
        context,
        name=record.name,
        salt=record.salt,
        conversation=conversation,
        num_inherited=record.num_inherited,
        is_pinned=record.is_pinned,
        ttl_s=record.ttl_s,
        response=None if record.response is None else KeptResponse(json.loads(record.response)),
        is_spare=record.is_spare,
        id=record.id,
        created=record.created,
    )


def _computed(engine: Engine, record: ContextRecord, space: str) -> Context:
    """A context with exactly the tokens of a record.

    The first segment goes in as ids, to which nothing is added: behind segments a tokenizer's start tokens would be.
    """
    first, *rest = (Segment(token_ids, name) for name, token_ids in record.segments)
    start = first.token_ids or [first, *rest]
    context = engine.context(start, adapter=record.adapter, tenant=space, name=record.name, policy=ReusePolicy.exact())
    if not first.token_ids:
        return context
    try:
        return context.extend(rest) if any(segment.token_ids for segment in rest) else context
    except BaseException:
        context.release()
        raise


def _behind(context_id: str) -> ApiError:
    message = (
        f"the replica that had context {context_id} is gone, and only an older version of it was kept than you have "
        "seen; make the context anew"
    )
    return ApiError(409, "context_behind", message, param="context_id")
