"""`/v1/contexts/{id}/snapshot` and `/v1/snapshots`: contexts that outlive the server."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Path

from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.contexts.conversation import Continued
from kvcomm.server.contexts.keeping import Snapshots, snapshots_of
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.surface import LOOKING, Id, RegistryDep
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.contexts.views import view
from kvcomm.server.errors import COMPUTING, ApiError, documented
from kvcomm.server.generation import CallDep, GenerationCall
from kvcomm.server.schemas.contexts import (
    ContextObject,
    DeletedSnapshot,
    RestoreRequest,
    SnapshotList,
    SnapshotName,
    SnapshotObject,
    SnapshotRequest,
)
from kvcomm.server.state import ServerState, StateDep, TenantDep
from kvcomm.server.waiting import in_thread

router = APIRouter(prefix="/v1", tags=["contexts"], dependencies=[Depends(security)], route_class=BodyRoute)

FILES = {**LOOKING, **documented(503)}

Name = Annotated[SnapshotName, Path()]


def _folder(state: StateDep, tenant: TenantDep) -> Snapshots:
    return folder_of(state, tenant.name)


def folder_of(state: ServerState, tenant: str) -> Snapshots:
    """The snapshots of the tenant with that name; raises ApiError 404 when the server keeps none."""
    found = snapshots_of(state, tenant)
    if found is None:
        message = (
            "this server keeps no snapshots; its operator gives a folder with `kvcomm serve --snapshots DIR`, or a "
            "shared tier that serves this tenant with --tier"
        )
        raise ApiError(404, "no_snapshots", message)
    return found


FolderDep = Annotated[Snapshots, Depends(_folder)]


@router.post("/contexts/{context_id}/snapshot", operation_id="saveContext", status_code=201, responses=COMPUTING)
async def save_context(
    context_id: Id, body: SnapshotRequest, registry: RegistryDep, folder: FolderDep
) -> SnapshotObject:
    """Write a context to a file, or to the shared tier, as it was before what is extending it now."""
    node = registry.find(context_id)
    with node.context.fork(name=node.name) as copy:
        copy.note = None if node.conversation is None else node.conversation.note()
        return await in_thread(partial(folder.save, copy, body.name, replace=body.replace))


@router.get("/snapshots", operation_id="listSnapshots", responses=FILES)
async def list_snapshots(folder: FolderDep) -> SnapshotList:
    """Every snapshot of the caller."""
    return SnapshotList(data=await anyio.to_thread.run_sync(folder.snapshots))


@router.post("/snapshots/{name}/restore", operation_id="restoreContext", status_code=201, responses=COMPUTING)
async def restore_context(name: Name, body: RestoreRequest, call: CallDep, folder: FolderDep) -> ContextObject:
    """A context from a snapshot; it has no parent."""
    return await call.guard(_restore(name, body, call, folder))


@router.delete("/snapshots/{name}", operation_id="deleteSnapshot", responses=FILES)
async def delete_snapshot(name: Name, folder: FolderDep) -> DeletedSnapshot:
    """Delete a snapshot; contexts made from it stay."""
    await anyio.to_thread.run_sync(folder.remove, name)
    return DeletedSnapshot(name=name)


async def _restore(name: str, body: RestoreRequest, call: GenerationCall, folder: Snapshots) -> ContextObject:
    registry = call.state.contexts.of(call.tenant)
    with registry.place():
        turn = await _read(name, body, call, folder, registry)
        node = registry.adopt(turn.hand_over(), body, salt=body.cache_salt, conversation=turn.conversation)
    return view(registry, node)


async def _read(
    name: str, body: RestoreRequest, call: GenerationCall, folder: Snapshots, registry: ContextRegistry
) -> Turn:
    state = call.state
    adapter = None if body.model is None else state.adapter_of(body.model)
    num_tokens = await anyio.to_thread.run_sync(folder.num_tokens, name)
    space = state.tenants.open_namespace(call.tenant, body.cache_salt)

    def read() -> Turn:
        context, conversation = folder.restore(state.engine, name, space=space, adapter=adapter)
        turn = call.take_turn(registry.new_turn(context))
        turn.put(Continued((), conversation))
        return turn

    async with state.admission.place(call.tenant, num_tokens):
        return await in_thread(read)  # if the caller is cancelled meanwhile, `close` finds the turn
