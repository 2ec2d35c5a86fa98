"""`/v1/contexts`: prefill, fork, extend, look, change, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query

from kvcomm.engine.context import PREFILL_ONLY
from kvcomm.engine.results import Completion
from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.contexts.conversation import Continued, continue_conversation
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import TenantContext, Turn
from kvcomm.server.contexts.views import branch_of, extended, view, views
from kvcomm.server.errors import COMPUTING, documented
from kvcomm.server.generation import CallDep, GenerationCall, GenerationJob
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.sampling import default_policy
from kvcomm.server.schemas.common import CONTEXT_ID, seconds
from kvcomm.server.schemas.contexts import (
    ContextBranch,
    ContextChange,
    ContextObject,
    ContextObjectList,
    ContextRequest,
    DeletedContexts,
    ExtendedContext,
    ForkRequest,
    PromptInput,
)
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.state import StateDep, TenantDep

router = APIRouter(prefix="/v1/contexts", tags=["contexts"], dependencies=[Depends(security)], route_class=BodyRoute)

Id = Annotated[str, Path(pattern=CONTEXT_ID)]


def _registry(state: StateDep, tenant: TenantDep) -> ContextRegistry:
    return state.contexts.of(tenant)


RegistryDep = Annotated[ContextRegistry, Depends(_registry)]
LOOKING = documented(400, 401, 403, 404, 429, 500)


@router.post("", operation_id="createContext", status_code=201, responses=COMPUTING)
async def create_context(body: ContextRequest, call: CallDep) -> ExtendedContext:
    """Compute a prompt and keep it."""
    return await call.guard(_create(body, call))


@router.get("", operation_id="listContexts", responses=LOOKING)
async def list_contexts(registry: RegistryDep) -> ContextObjectList:
    """Every context of the caller: a forest, given by parents, with the bytes of each branch."""
    registry.sweep()
    return ContextObjectList(data=views(registry))


@router.get("/{context_id}", operation_id="getContext", responses=LOOKING)
async def get_context(context_id: Id, registry: RegistryDep) -> ContextBranch:
    """A context, with the path to it and all that came from it. Counts as use."""
    return branch_of(registry, registry.find(context_id))


@router.post("/{context_id}/extend", operation_id="extendContext", responses=COMPUTING)
async def extend_context(context_id: Id, body: PromptInput, call: CallDep) -> ExtendedContext:
    """Compute more behind a context; its forks stay as they are."""
    return await call.guard(_extend(context_id, body, call))


@router.post("/{context_id}/fork", operation_id="forkContext", status_code=201, responses=COMPUTING)
async def fork_context(context_id: Id, body: ForkRequest, registry: RegistryDep) -> ContextObject:
    """A second context with all that is known at this moment, also while the first is busy. Copies no KV."""
    with registry.place():
        child = registry.fork(registry.find(context_id), body)
    return view(registry, child)


@router.patch("/{context_id}", operation_id="changeContext", responses=COMPUTING)
async def change_context(context_id: Id, body: ContextChange, registry: RegistryDep) -> ContextObject:
    """Change its name, its ttl or whether it is pinned."""
    node = registry.find(context_id)
    node.is_spare = False  # somebody cares for it
    if "name" in body.model_fields_set:
        node.name = body.name
    if body.ttl is not None:
        node.ttl_s = seconds(body.ttl)
    if body.pinned is not None:
        node.is_pinned = body.pinned
    return view(registry, node)


@router.delete("/{context_id}", operation_id="deleteContext", responses=LOOKING)
async def delete_context(
    context_id: Id,
    registry: RegistryDep,
    tenant: TenantDep,
    descendants: Annotated[bool, Query(description="Delete what came from it, too; else that lives on.")] = False,
) -> DeletedContexts:
    """Give its KV back. A request that extends it is cancelled."""
    node = registry.find(context_id)
    gone = registry.branch(node) if descendants else [node]
    registry.remove(gone)
    await anyio.to_thread.run_sync(_release, gone)
    await tenant.freed()
    return DeletedContexts(deleted=[each.id for each in gone])


def _release(nodes: list[TenantContext]) -> None:
    for node in nodes:
        node.release()


async def _create(body: ContextRequest, call: GenerationCall) -> ExtendedContext:
    registry = call.state.contexts.of(call.tenant)
    adapter = None if body.model is None else call.state.adapter_of(body.model)
    with registry.place():
        space = call.state.tenants.open_namespace(call.tenant, body.cache_salt)
        context = call.state.engine.empty_context(adapter=adapter, tenant=space)
        turn = call.take_turn(registry.new_turn(context))
        completion = await _prefill(turn, body, call, salt=body.cache_salt)
        node = registry.adopt(turn.hand_over(), body, salt=body.cache_salt, conversation=turn.conversation)
    return extended(registry, node, completion)


async def _extend(context_id: str, body: PromptInput, call: GenerationCall) -> ExtendedContext:
    registry = call.state.contexts.of(call.tenant)
    node = registry.find(context_id)
    turn = call.take_turn(registry.begin_turn(node, keeps=True))
    completion = await _prefill(turn, body, call, salt=node.salt)
    registry.find(context_id)  # it may have been deleted meanwhile
    return extended(registry, node, completion)


async def _prefill(turn: Turn, body: PromptInput, call: GenerationCall, *, salt: str | None) -> Completion:
    """Compute a turn's prompt; returns the engine's completion, without an answer."""
    turn.put(await call.make(partial(_read, call.state.prompts, turn, body), more_bytes=turn.num_rendered))
    job = GenerationJob(PreparedPrompt(turn.path), PREFILL_ONLY, default_policy(call.state.settings), salt, turn=turn)
    await call.submit(job)
    return (await call.results())[0]


def _read(maker: PromptMaker, turn: Turn, body: PromptInput) -> Continued:
    if body.messages is None:
        text = body.token_ids if body.text is None else body.text
        assert text is not None, "validated: one of the three is there"
        return Continued(maker.text(text, is_start=turn.num_kept == 0), None)
    tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
    is_start = turn.num_kept == 0
    return continue_conversation(maker, turn.before, body.messages, tools=tools, speaks=False, is_start=is_start)
