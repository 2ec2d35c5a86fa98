"""What tenants keep in a server, for the operator: who has how much, and how all of it goes.

A tenant whose last key is gone can give nothing back by itself, and what it pinned would hold the pool until a restart.
Removing a tenant concerns that tenant alone: its requests are cancelled and waited for, then what only it could reach
goes. Whatever still works for it finds that out before it keeps anything; a key made later begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress

import anyio.to_thread

from kvcomm.server.contexts.keeping import snapshots_of
from kvcomm.server.contexts.turns import TenantContext
from kvcomm.server.errors import ApiError
from kvcomm.server.keys import NAME_PATTERN
from kvcomm.server.schemas.admin import RemovedTenant, TenantStatus
from kvcomm.server.state import ServerState
from kvcomm.server.tenants import Tenant

logger = logging.getLogger("kvcomm.server")


def known_tenants(state: ServerState) -> list[str]:
    """By name: those with a key, those that have asked for something, those with snapshots."""
    return sorted({*state.tenants.names, *state.tenants.with_keys, *_with_snapshots(state)})


def require_known(state: ServerState, name: str) -> None:
    """Raises ApiError 404 for a tenant that nobody has heard of."""
    if name not in known_tenants(state):
        raise ApiError(404, "tenant_not_found", f"there is no tenant {name!r}", param="tenant")


def status_of(state: ServerState, name: str) -> TenantStatus:
    """What a tenant holds now."""
    tenant = state.tenants.find(name) or Tenant(name, state.tenants.limits_of(name))
    contexts, segments = state.contexts.find(name), state.registries.find(name)
    nodes = [] if contexts is None else contexts.nodes
    return TenantStatus(
        name=name,
        has_key=not state.tenants.is_revoked(name),
        requests_in_flight=tenant.num_requests,
        held_tokens=tenant.held_tokens,
        cached_tokens=state.tenants.num_cached(tenant),
        contexts=len(nodes),
        pinned_contexts=sum(node.is_pinned for node in nodes),
        context_tokens=tenant.context_tokens,
        conversation_bytes=0 if contexts is None else contexts.conversations.num_bytes,
        segments=0 if segments is None else len(segments.latest),
        segment_bytes=0 if segments is None else segments.num_bytes,
        salts=len(tenant.salts),
        limits=tenant.limits,
    )


async def remove_tenant(state: ServerState, name: str, *, snapshots: bool = False) -> RemovedTenant:
    """Remove all that a tenant has; `snapshots`: its files, too."""
    tenant, nodes = state.tenants.remove(name), state.contexts.remove(name)
    num_segments = state.registries.remove(name)
    state.prompts.texts.forget(name)
    num_requests = 0 if tenant is None else await _cancel(tenant)
    await release(nodes)
    cleared = 0 if tenant is None else await anyio.to_thread.run_sync(state.tenants.forget, tenant)
    return RemovedTenant(
        name=name,
        cancelled_requests=num_requests,
        contexts=len(nodes),
        segments=num_segments,
        cached_tokens=cleared,
        snapshots=len(await anyio.to_thread.run_sync(remove_snapshots, state, name)) if snapshots else 0,
    )


async def remove_revoked(state: ServerState) -> None:
    """Remove every tenant without a key, if the settings say so; files stay."""
    if not state.settings.remove_revoked:
        return
    for name in state.tenants.names:
        if state.tenants.is_revoked(name):
            removed = await remove_tenant(state, name)
            logger.info("tenant removed: no key is left", extra={"fields": removed.model_dump()})


async def release(nodes: list[TenantContext]) -> None:
    """Give back what a registry has forgotten; requests that write it are cancelled and waited for."""
    for node in nodes:
        await anyio.to_thread.run_sync(node.release)


def remove_snapshots(state: ServerState, name: str) -> list[str]:
    """Delete every snapshot of a tenant, in whatever state they are; returns their names. For a worker thread."""
    folder = snapshots_of(state, name)
    if folder is None:
        return []
    names = [snapshot.name for snapshot in folder.snapshots()]
    removed = []
    for each in names:
        with suppress(ApiError):  # somebody else was faster
            folder.remove(each)
            removed.append(each)
    return removed


async def _cancel(tenant: Tenant) -> int:
    """End a tenant's requests; returns how many there were."""
    handles = list(tenant.running)
    for handle in handles:
        handle.cancel()
    await tenant.freed()  # who waits for room finds that the tenant is gone
    await asyncio.gather(*(handle.aresult() for handle in handles), return_exceptions=True)
    return len(handles)


def _with_snapshots(state: ServerState) -> list[str]:
    root = state.settings.snapshots
    names = [] if root is None else [each.name for each in root.iterdir() if each.is_dir() and any(each.iterdir())]
    return [name for name in names if re.fullmatch(NAME_PATTERN, name)]
