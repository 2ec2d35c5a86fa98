"""`/v1/contexts`: prompts that stay, to be forked, extended and answered behind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.server.keys import NAME_PATTERN
from kvcomm.server.schemas.common import Body, NonEmpty, ResponseModel, Ttl, seconds
from kvcomm.server.schemas.completions import Ids
from kvcomm.server.schemas.messages import MAX_MESSAGES, MAX_TOOLS, RequestMessage, Tool
from kvcomm.server.schemas.usage import UsageObject

DisplayName = Annotated[str, Field(min_length=1, max_length=128, description="For people; need not be unique.")]
ContextLifetime = Annotated[
    Ttl | None, Field(description="How long the context lives after its last use, such as 30m; 1h unless said.")
]
Salt = Annotated[str, Field(min_length=1, max_length=128, description="As in requests: shares no cache with others.")]

SOURCES = ("text", "token_ids", "messages")


def given(name: str) -> JsonDict:
    """The schema of objects that have this field, and not as null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


ONE_SOURCE: JsonDict = {
    "oneOf": [given(name) for name in SOURCES],
    "if": given("tools"),
    "then": given("messages"),
}


class PromptInput(Body):
    """What goes into a context: exactly one of a text, token ids or messages."""

    model_config = ConfigDict(json_schema_extra=ONE_SOURCE)

    text: Annotated[NonEmpty, Field(description="As it is; control tokens spelled out are control tokens.")] | None = (
        None
    )
    token_ids: Ids | None = None
    messages: (
        Annotated[
            list[RequestMessage],
            Field(
                min_length=1,
                max_length=MAX_MESSAGES,
                fail_fast=True,
                description="Written by the chat template; more messages continue the conversation.",
            ),
        ]
        | None
    ) = None
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        Field(description="Shown by the chat template; only with messages."),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> PromptInput:
        found = [name for name in SOURCES if getattr(self, name) is not None]
        if len(found) != 1:
            raise PydanticCustomError(
                "source", "give exactly one of text, token_ids and messages, not {count} of them", {"count": len(found)}
            )
        if self.tools is not None and self.messages is None:
            raise PydanticCustomError("needs", "{param} is only allowed with messages", {"param": "tools"})
        return self


class Terms(Body):
    """How a new context is called and how long it stays."""

    name: DisplayName | None = None
    ttl: ContextLifetime = None
    pinned: Annotated[bool, Field(description="Keep it until it is deleted, whatever its ttl.")] = False

    @property
    def ttl_s(self) -> float | None:
        """Its ttl in seconds, if one was said."""
        return None if self.ttl is None else seconds(self.ttl)


ModelName = Annotated[
    str | None,
    Field(
        description="The model, or one of its adapters, that computes the context and answers behind it; by default the"
        " model itself."
    ),
]


class ContextRequest(PromptInput, Terms):
    """A context to be computed."""

    model: ModelName = None
    cache_salt: Salt | None = None


class ForkRequest(Terms):
    """A second context with the same past; without a ttl it has that of the first."""


class ContextChange(Body):
    """What is to change; what is left out stays."""

    name: Annotated[DisplayName | None, Field(description="null takes the name away.")] = None
    ttl: ContextLifetime = None
    pinned: bool | None = None


class ContextObject(ResponseModel):
    """A context now."""

    id: str
    object: Literal["context"] = "context"
    name: str | None
    parent: Annotated[str | None, Field(description="What it was forked from, or the nearest of those that is left.")]
    tokens: int
    own_tokens: Annotated[int, Field(description="Behind what it has from its parent.")]
    bytes: Annotated[int, Field(description="Of KV that no context before it in the list holds.")]
    conversation_bytes: Annotated[
        int, Field(description="Messages and tools it keeps beside its KV; counted once for forks that share them.")
    ]
    fidelity: Literal["exact", "approximate"]
    busy: Annotated[bool, Field(description="A request is extending it; it can be forked, and not be extended.")]
    pinned: bool
    expires_in_s: Annotated[float | None, Field(description="Unless it is used; null while pinned or busy.")]
    created: int


class ExtendedContext(ContextObject):
    """A context that was computed just now, and where its tokens came from."""

    usage: UsageObject


class ContextBranch(ContextObject):
    """A context, what it came from and what came from it."""

    ancestors: Annotated[list[str], Field(description="Ids, from the root to its parent.")]
    descendants: Annotated[list[ContextObject], Field(description="Parents before children.")]
    branch_bytes: Annotated[int, Field(description="Of its own and of its descendants' KV.")]


class ContextObjectList(ResponseModel):
    """All contexts of the caller, parents before children; the sum of their bytes is what they hold together."""

    object: Literal["list"] = "list"
    data: list[ContextObject]


SnapshotName = Annotated[str, Field(pattern=NAME_PATTERN)]


class SnapshotRequest(Body):
    """A file to be written."""

    name: SnapshotName
    replace: Annotated[bool, Field(description="Put it in place of one that has this name.")] = False


class RestoreRequest(Terms):
    """A context to be made from a file; without a name it has the one it was saved with."""

    model: ModelName = None
    cache_salt: Annotated[Salt | None, Field(description="That of the context that was saved.")] = None


class SnapshotObject(ResponseModel):
    """A file with the state of a context."""

    object: Literal["snapshot"] = "snapshot"
    name: str
    bytes: int
    tokens: int | None = None
    fidelity: Literal["exact", "approximate"] | None = None
    created: Annotated[str | None, Field(description="ISO 8601, UTC.")] = None
    refusal: Annotated[str | None, Field(description="Why it cannot be used, where it cannot.")] = None


class SnapshotList(ResponseModel):
    """The caller's snapshots, by name."""

    object: Literal["list"] = "list"
    data: list[SnapshotObject]


class DeletedSnapshot(ResponseModel):
    """What is no more."""

    object: Literal["snapshot.deleted"] = "snapshot.deleted"
    name: str


class DeletedContexts(ResponseModel):
    """What is no more."""

    object: Literal["context.deleted"] = "context.deleted"
    deleted: list[str]
