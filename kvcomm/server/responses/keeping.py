"""Stored responses: contexts whose id they share, found by their own tenant only, under the contexts' rules.

A response that follows another begins with a fork of that one's context, which holds the KV. Where the prompt would be
written differently now (other instructions, tools, thinking or model), it is written anew from the items, and the cache
has whatever part of it is the same. A response that its client asked to store is kept or refused; one that was not
spoken of is kept while there is room for it, and makes room for others.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

from pydantic import TypeAdapter

from kvcomm.server.contexts.kept_response import KeptResponse
from kvcomm.server.contexts.registry import ContextRegistry
from kvcomm.server.contexts.turns import NewId, TenantContext, Turn
from kvcomm.server.errors import ApiError
from kvcomm.server.generation import GenerationCall
from kvcomm.server.responses.translation import SentItem, items_of
from kvcomm.server.schemas.response_items import Item
from kvcomm.server.schemas.responses import ResponseObject, ResponsePrompt
from kvcomm.server.state import ServerState
from kvcomm.server.tenants import Tenant

SPARE_SHARE = 4
"""Of the pool, of a tenant's quota and of what it may keep beside it, responses that nobody asked to keep take a part:
one in so many, and of the pool that divided by the tenants."""

QUOTA_EXCEEDED = "quota_exceeded"
"""Code of the error where a tenant keeps as much as it may."""

ITEMS: TypeAdapter[list[SentItem]] = TypeAdapter(list[Item])


def context_id_of(response_id: str) -> str:
    """Id of the context that a response ends."""
    return f"ctx_{response_id.removeprefix('resp_')}"


def response_id(new_id: NewId, previous: str | None) -> str:
    """A new id for a response; `previous` is the id of the one that it follows, if it follows one."""
    return f"resp_{new_id(None if previous is None else context_id_of(previous)).removeprefix('ctx_')}"


class Stored:
    """A response that was stored."""

    def __init__(self, node: TenantContext, kept: KeptResponse) -> None:
        self.node = node
        self._kept = kept

    @cached_property
    def _values(self) -> dict[str, Any]:
        return dict(self._kept.read())

    @property
    def num_bytes(self) -> int:
        """What reading it takes."""
        return self._kept.num_bytes

    @property
    def response(self) -> ResponseObject:
        """What was answered."""
        return ResponseObject.model_validate(self._values["response"])

    @property
    def input_items(self) -> list[SentItem]:
        """What it answers, from the beginning of the conversation."""
        return ITEMS.validate_python(self._values["input"])

    @property
    def items(self) -> list[SentItem]:
        """The same, and the answer."""
        return ITEMS.validate_python([*self._values["input"], *self._values["response"]["output"]])

    def is_shown_as(self, request: ResponsePrompt) -> bool:
        """Whether a request that follows would show the model what came before as it was shown."""
        return bool(self._values["shown"] == _shown(request))


def find(registry: ContextRegistry, response_id: str, *, is_previous: bool = False) -> Stored:
    """A stored response, which counts as use.

    Raises:
        ApiError: 404.
    """
    try:
        node = registry.find(context_id_of(response_id))
    except ApiError:
        node = None
    if node is not None and node.response is not None:
        return Stored(node, node.response)
    message = f"there is no stored response {response_id!r}; it may have expired or been deleted, or not been stored"
    if is_previous:
        raise ApiError(404, "previous_response_not_found", message, param="previous_response_id")
    raise ApiError(404, "response_not_found", message, param="response_id")


class ResponsePlace:
    """A place for one response, from before it is computed."""

    def __init__(self, call: GenerationCall, *, is_spare: bool) -> None:
        """`is_spare`: nobody asked for it; raises ApiError as `ContextRegistry.place`."""
        self.is_spare = is_spare
        self._call = call
        self._registry = call.state.contexts.of(call.tenant)
        self._place = ExitStack()
        self._place.enter_context(self._registry.place())
        call.at_end(self._place.close)

    @classmethod
    def find(cls, call: GenerationCall, store: bool | None) -> Self | None:
        """What a request gets that says `store`; None: it is not kept.

        Raises:
            ApiError: 429, there is no place for what is to be stored.
        """
        if store is False:
            return None
        try:
            return cls(call, is_spare=store is None)
        except ApiError as error:
            if store or error.code != QUOTA_EXCEEDED:
                raise
            return None

    def give_back(self) -> None:
        """Nothing will be kept here."""
        self._place.close()

    async def keep(self, turn: Turn, response: ResponseObject, request: ResponsePrompt, past: Stored | None) -> None:
        """Keep a response that has come to its end.

        Raises:
            ApiError: 409 when the operator has removed the tenant.
        """
        kept = await self._call.state.workers.start(partial(_kept, response, request, past))
        node = TenantContext(
            turn.hand_over(),
            name=response.id,
            id=context_id_of(response.id),
            response=kept,
            is_spare=self.is_spare,
        )
        self._place.close()
        self._registry.adopt_response(node, turn, behind=None if past is None else past.node)
        self._registry.trim(*_spare_room(self._call.state, self._call.tenant))


def _kept(response: ResponseObject, request: ResponsePrompt, past: Stored | None) -> KeptResponse:
    items = [*(() if past is None else past.items), *items_of(request)]
    return KeptResponse(
        {
            "response": response.model_dump(mode="json"),
            "input": ITEMS.dump_python(items, by_alias=True, exclude_none=True, mode="json"),
            "shown": _shown(request),
        }
    )


def _shown(request: ResponsePrompt) -> dict[str, Any]:
    """What of a request stands before its items, or changes how they are shown."""
    tools = request.tools if request.tool_choice != "none" else None
    return {
        "model": request.model,
        "instructions": request.instructions,
        "tools": [tool.model_dump(mode="json") for tool in tools or ()],
        "effort": None if request.reasoning is None else request.reasoning.effort,
    }


class _Room(NamedTuple):
    """What spare responses of one tenant may take."""

    max_tokens: int
    max_bytes: int


def _spare_room(state: ServerState, tenant: Tenant) -> _Room:
    pool = state.engine.cache
    num_tokens = pool.num_pages * pool.page_size // max(1, state.num_tenants())
    if tenant.limits.held_tokens is not None:
        num_tokens = min(num_tokens, tenant.limits.held_tokens)
    return _Room(num_tokens // SPARE_SHARE, state.settings.max_kept_bytes // SPARE_SHARE)
