"""Segments in requests, and the registry of named ones (`/v1/segments`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.common import WHOLE, Body, GenerationRequest, NonEmpty, RequestModel, ResponseModel, Ttl

SEGMENT_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$"
MAX_SEGMENTS = 64
"""In one request."""

Kind = Literal["static", "dynamic"]
Boundary = Literal["separate", "strict", "merge"]
Version = Annotated[int, Field(ge=1, le=2**31), WHOLE]


class SegmentFields(RequestModel):
    """What all segments of requests have."""

    id: Annotated[str, Field(min_length=1, max_length=128, description="Yours, for what answers say about it.")]
    hash: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="The segment's SHA-256 as this server told it. Only checked: a wrong one is a 409.",
        ),
    ] = None
    ttl: Annotated[Ttl | None, Field(description="How long it stays cached behind the segments before it.")] = None


class TextSegment(SegmentFields):
    """A segment with its text."""

    content: NonEmpty
    kind: Annotated[
        Kind, Field(description="dynamic: a question, an answer: its text differs from request to request.")
    ] = "static"


class NamedSegment(SegmentFields):
    """A segment of the registry."""

    name: Annotated[str, Field(pattern=SEGMENT_NAME)]
    version: Annotated[Version | None, Field(description="By default the latest.")] = None


def _form(value: object) -> str:
    is_named = isinstance(value, NamedSegment) or (isinstance(value, dict) and "name" in value)
    return "named" if is_named else "text"


SegmentInput = Annotated[
    Annotated[TextSegment, Tag("text")] | Annotated[NamedSegment, Tag("named")], Discriminator(_form)
]
BOUNDARY = (
    "How texts meet: separate, each is tokenized alone; strict, a 422 where that would split a token; merge, "
    "the whole is tokenized as one and tokens across a boundary are always computed."
)


class SegmentedRequest(GenerationRequest):
    """A request whose prompt may begin with segments."""

    segments: Annotated[
        list[SegmentInput] | None,
        Field(max_length=MAX_SEGMENTS, fail_fast=True, description="Stand before everything else, in this order."),
    ] = None
    boundary: Annotated[Boundary, Field(description=BOUNDARY)] = "separate"

    @model_validator(mode="after")
    def _check_segments(self) -> SegmentedRequest:
        if self.segments and self.context_id is not None:
            raise PydanticCustomError(
                "needs", "{param} is not allowed with context_id: segments begin a prompt", {"param": "segments"}
            )
        return self


class SegmentPut(Body):
    """A text to be kept under a name."""

    content: NonEmpty
    kind: Kind = "static"
    ttl: Annotated[Ttl | None, Field(description="Of its KV, where a request does not say.")] = None


class SegmentRecord(ResponseModel):
    """A version of a named segment."""

    object: Literal["segment"] = "segment"
    name: str
    version: int
    hash: Annotated[str, Field(description="SHA-256 over the model's namespace of your tenant, and the token ids.")]
    tokens: int
    kind: Kind
    ttl: str | None
    created: Annotated[int, Field(description="Seconds since 1970.")]


class SegmentDetails(SegmentRecord):
    """A version with its text."""

    content: str


class SegmentList(ResponseModel):
    """Named segments, or versions of one."""

    object: Literal["list"] = "list"
    data: list[SegmentRecord]


class SegmentDeleted(ResponseModel):
    """A name that stands for nothing any more; what is cached of its text stays until its pages are needed."""

    object: Literal["segment.deleted"] = "segment.deleted"
    name: str
    versions: Annotated[int, Field(description="How many went.")]
    deleted: Literal[True] = True
