"""`/v1/responses`: answer, look, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query
from starlette.responses import Response

from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.contexts.answering import put_messages
from kvcomm.server.contexts.conversation import NOT_CONTINUED
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import Turn
from kvcomm.server.errors import COMPUTING, ApiError, documented
from kvcomm.server.generation import CallDep, GenerationCall
from kvcomm.server.removal import release
from kvcomm.server.responses.answer import ResponseAnswer
from kvcomm.server.responses.keeping import Stored, find
from kvcomm.server.responses.shown_items import page_of
from kvcomm.server.responses.translation import NAMES, chat_request, items_of
from kvcomm.server.schemas.responses import (
    RESPONSE_ID,
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponseObject,
    ResponsePrompt,
    ResponseRequest,
)
from kvcomm.server.state import StateDep, TenantDep
from kvcomm.server.streaming import EventStream, Wire, documented_stream, named_event
from kvcomm.server.translation import told_as

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], dependencies=[Depends(security)], route_class=BodyRoute)

Id = Annotated[str, Path(pattern=RESPONSE_ID)]
LOOKING = documented(400, 401, 403, 404, 409, 429, 500)


def _registry(state: StateDep, tenant: TenantDep) -> ContextRegistry:
    return state.contexts.of(tenant)


RegistryDep = Annotated[ContextRegistry, Depends(_registry)]


@router.post(
    "",
    operation_id="createResponse",
    response_model=ResponseObject,
    responses={
        **documented_stream("The response; with `stream`, server-sent events that are named by their type."),
        **COMPUTING,
    },
)
async def create_response(body: ResponseRequest, call: CallDep) -> Response | ResponseObject:
    """Answer a conversation, or continue one that was stored."""
    with told_as(NAMES):
        return await call.guard(_answer(body, call))


@router.post("/input_tokens", operation_id="countResponseInputTokens", responses=COMPUTING)
async def count_input_tokens(body: ResponsePrompt, call: CallDep) -> InputTokens:
    """Tokens of a prompt, which is not computed."""
    with told_as(NAMES):
        return await call.guard(_count(body, call))


@router.get("/{response_id}", operation_id="getResponse", responses=LOOKING)
async def get_response(
    response_id: Id,
    registry: RegistryDep,
    state: StateDep,
    stream: Annotated[Literal["false"] | None, Query(description="A stored response is not streamed again.")] = None,
) -> ResponseObject:
    """A stored response. Counts as use."""
    stored = find(registry, response_id)
    return await state.workers.run(registry.tenant.name, stored.num_bytes, lambda: stored.response)


@router.get("/{response_id}/input_items", operation_id="listResponseInputItems", responses=LOOKING)
async def list_input_items(
    response_id: Id,
    registry: RegistryDep,
    state: StateDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
) -> ItemList:
    """What a stored response answers: every item of the conversation before it."""
    stored = find(registry, response_id)
    work = partial(page_of, stored, limit=limit, order=order, after=after)
    return await state.workers.run(registry.tenant.name, stored.num_bytes, work)


@router.delete("/{response_id}", operation_id="deleteResponse", responses=LOOKING)
async def delete_response(response_id: Id, registry: RegistryDep, tenant: TenantDep) -> DeletedResponse:
    """Give its KV back; responses that follow it live on."""
    node = find(registry, response_id).node
    registry.remove([node])
    await release([node])
    await tenant.freed()
    return DeletedResponse(id=response_id)


async def _answer(body: ResponseRequest, call: GenerationCall) -> Response | ResponseObject:
    answer = ResponseAnswer(body, call)
    await answer.begin()
    if not body.stream:
        return await answer.whole()
    pieces = answer.pieces()
    # Errors before the first token still have a status of their own.
    first = await anext(pieces, None)
    return EventStream(answer.events(first, pieces), deadline_s=call.deadline_s, wire=Wire(named_event, answer.failure))


async def _count(body: ResponsePrompt, call: GenerationCall) -> InputTokens:
    call.state.adapter_of(body.model)
    past, turn = None, None
    if body.previous_response_id is not None:
        registry = call.state.contexts.of(call.tenant)
        past = find(registry, body.previous_response_id, is_previous=True)
        turn = call.take_turn(registry.turn_behind(past.node, keeps=False))

    work = partial(_num_tokens, body, past, turn, call)
    return InputTokens(input_tokens=await call.make(work, more_bytes=0 if past is None else past.num_bytes))


def _num_tokens(body: ResponsePrompt, past: Stored | None, turn: Turn | None, call: GenerationCall) -> int:
    """Tokens of a prompt as `create_response` would make it, on a turn behind what is past; for a worker thread."""
    prompts = call.state.prompts
    if past is not None and turn is not None and past.is_shown_as(body):
        try:
            return put_messages(turn, chat_request(body, items_of(body), is_whole=False), prompts).num_tokens
        except ApiError as error:
            if error.code != NOT_CONTINUED:
                raise
    items = [*(() if past is None else past.items), *items_of(body)]
    return prompts.chat(chat_request(body, items), call.tenant.name).num_tokens
