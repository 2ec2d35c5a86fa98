"""`/v1/messages`: answers as Anthropic documents them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel
from kvcomm.server.schemas.usage import BoundObject, Timings

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerText(ResponseModel):
    """What the model says."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class AnswerThinking(ResponseModel):
    """What the model thinks before it answers; there is nothing to sign it with."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class AnswerToolUse(ResponseModel):
    """A call; arguments that are no JSON object are given as they are, under the name INVALID_JSON."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = Annotated[AnswerText | AnswerThinking | AnswerToolUse, Field(discriminator="type")]


class CacheCreation(ResponseModel):
    """New in the cache, by the lifetime that was asked for."""

    ephemeral_5m_input_tokens: Annotated[int, Field(ge=0)]
    ephemeral_1h_input_tokens: Annotated[int, Field(ge=0)]


class MessagesUsage(ResponseModel):
    """The prompt's tokens are the sum of the first three. Every prefix is cached, with a breakpoint or without."""

    input_tokens: Annotated[int, Field(ge=0, description="Neither read from the cache nor told as created there.")]
    cache_read_input_tokens: Annotated[int, Field(ge=0, description="KV reused that equals a cold run's.")]
    cache_creation_input_tokens: Annotated[
        int, Field(ge=0, description="Computed for a request with a breakpoint, and cached from now on.")
    ]
    cache_creation: CacheCreation
    output_tokens: Annotated[int, Field(ge=0)]
    service_tier: Literal["standard"] = "standard"
    miss_reasons: Annotated[dict[str, int], Field(description="Why prompt tokens were computed: reason -> tokens.")] = (
        Field(default_factory=dict)
    )
    bound: Annotated[BoundObject | None, Field(description="The bound in force; null for exact requests.")] = None
    timings: Annotated[Timings | None, Field(description="Null while the answer is streamed.")] = None


class MessageAnswer(ResponseModel):
    """What the model answers; without a stop reason while it is streamed."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(ResponseModel):
    """How long a prompt is."""

    input_tokens: Annotated[int, Field(ge=0)]


class MessagesErrorCode(ResponseModel):
    """What Anthropic's clients look at."""

    error_code: Annotated[str, Field(description="For programs, such as model_not_found.")]


class MessagesErrorDetail(ResponseModel):
    """What went wrong."""

    type: str
    message: str
    details: MessagesErrorCode
    param: Annotated[str | None, Field(description="The field at fault, where one is.")] = None
    code: Annotated[str, Field(description="The same as `details.error_code`.")]


class MessagesErrorResponse(ResponseModel):
    """The body of every answer that is not a success."""

    type: Literal["error"] = "error"
    error: MessagesErrorDetail
    request_id: str | None
