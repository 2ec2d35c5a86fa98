"""Items of the Responses API: what a conversation consists of, as clients send it and as answers hold it.

What was an answer's item comes back as it was, with its id and status: those have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.chat import ChatTokenLogprob
from kvcomm.server.schemas.common import (
    IGNORED,
    Label,
    PromptCacheBreakpoint,
    RequestModel,
    ResponseModel,
    one_or_many,
    only,
)
from kvcomm.server.schemas.messages import MAX_PARTS

ResponseStatus = Literal["in_progress", "completed", "incomplete"]
ItemRole = Literal["user", "assistant", "system", "developer"]
Ignored = Annotated[Any, Field(description=IGNORED)]
ItemId = Annotated[Label | None, Field(description=IGNORED)]
ItemStatus = Annotated[ResponseStatus | None, Field(description=IGNORED)]
Parts = Annotated[list[Any], Field(max_length=MAX_PARTS)]
IgnoredParts = Annotated[Parts | None, Field(description=IGNORED)]


def _known(*kinds: str, what: str, default: str = "") -> BeforeValidator:
    """Refuses by name what is of another `type`."""

    def check(value: object) -> object:
        kind = value.get("type", default) if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            raise PydanticCustomError(
                "unsupported",
                "is of type {kind}, which is not supported: {what}",
                {"kind": repr(kind[:60]), "what": what},
            )
        return value

    return BeforeValidator(check)


class InputText(RequestModel):
    """A piece of text."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None


class SentOutputText(RequestModel):
    """A piece of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: IgnoredParts = None
    logprobs: IgnoredParts = None


class SentRefusal(RequestModel):
    """Words of an earlier answer that refused."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it says."""
        return self.refusal


ItemPart = Annotated[
    Annotated[InputText | SentOutputText | SentRefusal, Field(discriminator="type")],
    _known("input_text", "output_text", "refusal", what="this model reads text"),
]
Content = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[ItemPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("many")],
    Discriminator(one_or_many),
]
Result = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[
        list[Annotated[InputText, _known("input_text", what="this model reads text")]],
        Field(max_length=MAX_PARTS, fail_fast=True),
        Tag("many"),
    ],
    Discriminator(one_or_many),
]


class SentMessage(RequestModel):
    """What somebody says; an answer's message is one, too."""

    type: Literal["message"] = "message"
    role: ItemRole
    content: Content
    id: ItemId = None
    status: ItemStatus = None
    phase: Annotated[Literal["commentary", "final_answer"] | None, Field(description=IGNORED)] = None


class SentCall(RequestModel):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: Label
    name: Label
    arguments: str
    id: ItemId = None
    status: ItemStatus = None
    caller: Ignored = None
    async_: Annotated[bool | None, Field(alias="async", description=IGNORED)] = None
    namespace: only(None, why="is not supported; leave it out") = None  # type: ignore[valid-type]


class SentCallOutput(RequestModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Label
    output: Result
    id: ItemId = None
    status: ItemStatus = None
    caller: Ignored = None
    name: Annotated[Label | None, Field(description=IGNORED)] = None
    namespace: only(None, why="is not supported; leave it out") = None  # type: ignore[valid-type]


class SummaryText(RequestModel):
    """A piece of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(RequestModel):
    """A piece of what a model thought."""

    type: Literal["reasoning_text"]
    text: str


class SentReasoning(RequestModel):
    """What the model thought before it said or called what follows; given to the chat template."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    encrypted_content: Annotated[str | None, Field(description=IGNORED)] = None
    id: ItemId = None
    status: ItemStatus = None


def _kind(value: object) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[
        Annotated[SentMessage, Tag("message")]
        | Annotated[SentCall, Tag("function_call")]
        | Annotated[SentCallOutput, Tag("function_call_output")]
        | Annotated[SentReasoning, Tag("reasoning")],
        Discriminator(_kind),
    ],
    _known(
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        what="messages, function calls, their outputs and reasoning are, written out",
        default="message",
    ),
]


class OutputText(ResponseModel):
    """A piece of what the model says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ChatTokenLogprob] = Field(default_factory=list)


class OutputReasoningText(ResponseModel):
    """A piece of what the model thinks."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(ResponseModel):
    """What the model says."""

    id: str
    type: Literal["message"] = "message"
    status: ResponseStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(ResponseModel):
    """A call of a function; `arguments` is JSON text as the model wrote it."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ResponseStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(ResponseModel):
    """What the model thinks before it answers; there are no summaries of it."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ResponseStatus
    summary: list[Any] = Field(default_factory=list)
    content: list[OutputReasoningText]


OutputItem = Annotated[OutputMessage | OutputCall | OutputReasoning, Field(discriminator="type")]
