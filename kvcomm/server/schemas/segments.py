"""Segments in requests, and the registry of named ones (`/v1/segments`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.common import (
    CONTEXT_ID,
    WHOLE,
    Body,
    GenerationRequest,
    NonEmpty,
    RequestModel,
    ResponseModel,
    Ttl,
)

SEGMENT_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$"
MAX_SEGMENTS = 64
"""In one request."""

SegmentKind = Literal["static", "dynamic"]
Boundary = Literal["separate", "strict", "merge"]
VersionNumber = Annotated[int, Field(ge=1, le=2**31), WHOLE]


class AnySegment(RequestModel):
    """What all segments of requests have."""

    id: Annotated[str, Field(min_length=1, max_length=128, description="Yours, for what answers say about it.")]
    ttl: Annotated[Ttl | None, Field(description="How long it stays cached behind the segments before it.")] = None


class KnownSegment(AnySegment):
    """A segment whose text is there."""

    hash: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="The segment's SHA-256 as this server told it. Only checked: a wrong one is a 409.",
        ),
    ] = None


class TextSegment(KnownSegment):
    """A segment with its text."""

    content: NonEmpty
    kind: Annotated[
        SegmentKind, Field(description="dynamic: a question, an answer: its text differs from request to request.")
    ] = "static"


class RegisteredSegment(KnownSegment):
    """A segment of the registry."""

    name: Annotated[str, Field(pattern=SEGMENT_NAME)]
    version: Annotated[VersionNumber | None, Field(description="By default the latest.")] = None


class AnswerSegment(AnySegment):
    """The first answer of another request of yours, which is read while it is written."""

    response_id: Annotated[
        str,
        Field(
            min_length=1,
            max_length=128,
            description="The id of an answer in progress (it stands in every event of its stream), or of one that has "
            "just ended; or the `x-request-id` that you gave its request.",
        ),
    ]


class ContextAnswerSegment(AnySegment):
    """The answer that a context of yours is being extended with, which is read while it is written."""

    context_id: Annotated[
        str, Field(pattern=CONTEXT_ID, description="Of a request with `store` in progress, or that has just ended.")
    ]


FollowedSegment = AnswerSegment | ContextAnswerSegment
"""An answer that may not be complete yet."""


def _form(value: object) -> str:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    forms = {"name": "named", "response_id": "answer", "context_id": "context"}
    return next((form for field, form in forms.items() if field in fields), "text")


def _known_form(value: object) -> str:
    return "named" if _form(value) == "named" else "text"


Text = Annotated[TextSegment, Tag("text")]
Named = Annotated[RegisteredSegment, Tag("named")]
SegmentInput = Annotated[Text | Named, Discriminator(_known_form)]
PromptSegment = Annotated[
    Text | Named | Annotated[AnswerSegment, Tag("answer")] | Annotated[ContextAnswerSegment, Tag("context")],
    Discriminator(_form),
]
BOUNDARY = (
    "How texts meet: separate, each is tokenized alone; strict, a 422 where that would split a token; merge, "
    "the whole is tokenized as one and tokens across a boundary are always computed."
)


class SegmentedRequest(GenerationRequest):
    """A request whose prompt may begin with segments."""

    segments: Annotated[
        list[PromptSegment] | None,
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
    kind: SegmentKind = "static"
    ttl: Annotated[Ttl | None, Field(description="Of its KV, where a request does not say.")] = None


class SegmentObject(ResponseModel):
    """A version of a named segment."""

    object: Literal["segment"] = "segment"
    name: str
    version: int
    hash: Annotated[str, Field(description="SHA-256 over the model's namespace of your tenant, and the token ids.")]
    tokens: int
    kind: SegmentKind
    ttl: str | None
    created: Annotated[int, Field(description="Seconds since 1970.")]


class SegmentDetails(SegmentObject):
    """A version with its text."""

    content: str


class SegmentList(ResponseModel):
    """Named segments, or versions of one."""

    object: Literal["list"] = "list"
    data: list[SegmentObject]


class SegmentDeleted(ResponseModel):
    """A name that stands for nothing any more; what is cached of its text stays until its pages are needed."""

    object: Literal["segment.deleted"] = "segment.deleted"
    name: str
    versions: Annotated[int, Field(description="How many went.")]
    deleted: Literal[True] = True
