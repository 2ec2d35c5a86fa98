"""`/admin/tenants`: what each tenant keeps, for the operator to look at and to remove, one thing or all.

Everything is named below the tenant that has it, and looked up among that tenant's own only.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query

from kvcomm.server.access import security
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.snapshot_surface import folder_of
from kvcomm.server.contexts.turns import TenantContext
from kvcomm.server.contexts.views import views
from kvcomm.server.errors import ApiError, documented
from kvcomm.server.keys import NAME_PATTERN
from kvcomm.server.removal import known_tenants, release, remove_snapshots, remove_tenant, require_known, status_of
from kvcomm.server.schemas.admin import DeletedSegments, DeletedSnapshots, RemovedTenant, TenantList, TenantStatus
from kvcomm.server.schemas.common import CONTEXT_ID
from kvcomm.server.schemas.contexts import (
    ContextObjectList,
    DeletedContexts,
    DeletedSnapshot,
    SnapshotList,
    SnapshotName,
)
from kvcomm.server.schemas.segments import SEGMENT_NAME, SegmentDeleted, SegmentList
from kvcomm.server.segments.registry import SegmentRegistry
from kvcomm.server.segments.surface import record
from kvcomm.server.state import ServerState, StateDep

router = APIRouter(prefix="/admin/tenants", tags=["operator"], dependencies=[Depends(security)])
LOOKING = documented(400, 401, 403, 404, 500)


def _known(tenant: Annotated[str, Path(pattern=NAME_PATTERN)], state: StateDep) -> str:
    require_known(state, tenant)
    return tenant


KnownTenant = Annotated[str, Depends(_known)]
Descendants = Annotated[bool, Query(description="Delete what came from it, too; else that lives on.")]


@router.get("", operation_id="listTenants", responses=documented(401, 403, 500))
def list_tenants(state: StateDep) -> TenantList:
    """Every tenant, and what it holds."""
    return TenantList(data=[status_of(state, name) for name in known_tenants(state)])


@router.get("/{tenant}", operation_id="getTenant", responses=LOOKING)
def get_tenant(tenant: KnownTenant, state: StateDep) -> TenantStatus:
    """What a tenant holds."""
    return status_of(state, tenant)


@router.delete("/{tenant}", operation_id="removeTenant", responses=LOOKING)
async def delete_tenant(
    tenant: KnownTenant,
    state: StateDep,
    snapshots: Annotated[bool, Query(description="Delete its snapshots, too; else they stay.")] = False,
) -> RemovedTenant:
    """Remove all that a tenant has here; its requests are cancelled. Its keys, if it has some, begin anew."""
    return await remove_tenant(state, tenant, snapshots=snapshots)


@router.get("/{tenant}/contexts", operation_id="listTenantContexts", responses=LOOKING)
async def list_contexts(tenant: KnownTenant, state: StateDep) -> ContextObjectList:
    """Every context of a tenant, as it sees them itself. Does not count as use."""
    registry = state.contexts.find(tenant)
    if registry is None:
        return ContextObjectList(data=[])
    registry.sweep()
    return ContextObjectList(data=views(registry))


@router.delete("/{tenant}/contexts", operation_id="deleteTenantContexts", responses=LOOKING)
async def delete_contexts(tenant: KnownTenant, state: StateDep) -> DeletedContexts:
    """Give the KV of all its contexts back. Requests that extend them are cancelled."""
    registry = state.contexts.find(tenant)
    return DeletedContexts(deleted=[]) if registry is None else await _delete(registry, registry.nodes)


@router.delete("/{tenant}/contexts/{context_id}", operation_id="deleteTenantContext", responses=LOOKING)
async def delete_context(
    tenant: KnownTenant,
    context_id: Annotated[str, Path(pattern=CONTEXT_ID)],
    state: StateDep,
    descendants: Descendants = False,
) -> DeletedContexts:
    """Give the KV of one of its contexts back. A request that extends it is cancelled."""
    registry = state.contexts.find(tenant)
    if registry is None:
        message = f"tenant {tenant!r} has no context {context_id!r}"
        raise ApiError(404, "context_not_found", message, param="context_id")
    node = registry.find(context_id)
    return await _delete(registry, registry.branch(node) if descendants else [node])


@router.get("/{tenant}/segments", operation_id="listTenantSegments", responses=LOOKING)
async def list_segments(tenant: KnownTenant, state: StateDep) -> SegmentList:
    """The latest version of each of its named segments."""
    return SegmentList(data=[record(each) for each in _segments(state, tenant).latest])


@router.delete("/{tenant}/segments", operation_id="deleteTenantSegments", responses=LOOKING)
async def delete_segments(tenant: KnownTenant, state: StateDep) -> DeletedSegments:
    """Forget all its named segments."""
    registry = _segments(state, tenant)
    names = [each.name for each in registry.latest]
    for name in names:
        registry.remove(name)
    return DeletedSegments(deleted=names)


@router.delete("/{tenant}/segments/{name}", operation_id="deleteTenantSegment", responses=LOOKING)
async def delete_segment(
    tenant: KnownTenant, name: Annotated[str, Path(pattern=SEGMENT_NAME)], state: StateDep
) -> SegmentDeleted:
    """Forget one of its named segments and its versions."""
    return SegmentDeleted(name=name, versions=_segments(state, tenant).remove(name))


@router.get("/{tenant}/snapshots", operation_id="listTenantSnapshots", responses=LOOKING)
async def list_snapshots(tenant: KnownTenant, state: StateDep) -> SnapshotList:
    """Its snapshots."""
    return SnapshotList(data=await anyio.to_thread.run_sync(folder_of(state, tenant).snapshots))


@router.delete("/{tenant}/snapshots", operation_id="deleteTenantSnapshots", responses=LOOKING)
async def delete_snapshots(tenant: KnownTenant, state: StateDep) -> DeletedSnapshots:
    """Delete all its snapshots; contexts made from them stay."""
    folder_of(state, tenant)
    return DeletedSnapshots(deleted=await anyio.to_thread.run_sync(remove_snapshots, state, tenant))


@router.delete("/{tenant}/snapshots/{name}", operation_id="deleteTenantSnapshot", responses=LOOKING)
async def delete_snapshot(
    tenant: KnownTenant, name: Annotated[SnapshotName, Path()], state: StateDep
) -> DeletedSnapshot:
    """Delete one of its snapshots."""
    await anyio.to_thread.run_sync(partial(folder_of(state, tenant).remove, name))
    return DeletedSnapshot(name=name)


async def _delete(registry: ContextRegistry, gone: list[TenantContext]) -> DeletedContexts:
    registry.remove(gone)
    await release(gone)
    await registry.tenant.freed()
    return DeletedContexts(deleted=[each.id for each in gone])


def _segments(state: ServerState, tenant: str) -> SegmentRegistry:
    """A tenant's registry; an empty one that nobody keeps where it has none."""
    return state.registries.find(tenant) or SegmentRegistry(0, 0)
