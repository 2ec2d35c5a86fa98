"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.common import (
    IGNORED,
    ON_CONTEXT,
    ONE_STORED,
    WHOLE,
    GenerationRequest,
    Label,
    ResponseModel,
    only,
)
from kvcomm.server.schemas.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AllowedToolsChoice,
    Message,
    NamedTool,
    Tool,
    ToolChoice,
)
from kvcomm.server.schemas.segments import SegmentedRequest
from kvcomm.server.schemas.usage import Usage
from kvcomm.toolcalls.choice import ToolChoice as Choice

FinishReason = Literal["stop", "length", "tool_calls"]

MetadataName = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=16)]
Prediction = Annotated[dict[str, Any], Field(max_length=16)]

NEEDS_STREAM: JsonDict = {
    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
NEEDS_LOGPROBS: JsonDict = {
    "if": {"properties": {"top_logprobs": {"type": "integer"}}, "required": ["top_logprobs"]},
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}
NEEDS_TOOLS: JsonDict = {
    "if": {
        "properties": {"tool_choice": {"not": {"enum": [None, "auto", "none"]}}, "context_id": {"type": "null"}},
        "required": ["tool_choice"],
    },
    "then": {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
}
NEEDS_MESSAGES: JsonDict = {
    "if": {"properties": {"context_id": {"type": "string"}}, "required": ["context_id"]},
    "else": {"properties": {"messages": {"minItems": 1}}},
}


def require_stream(request: GenerationRequest) -> None:
    """OpenAI's rule: `stream_options` only with `stream`."""
    if request.stream_options is not None and not request.stream:
        raise PydanticCustomError("needs", "{param} is only allowed when stream is true", {"param": "stream_options"})


class ChatRequest(SegmentedRequest):
    """A conversation to be continued."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [NEEDS_STREAM, NEEDS_LOGPROBS, NEEDS_TOOLS, NEEDS_MESSAGES, ON_CONTEXT, ONE_STORED]}
    )

    messages: Annotated[
        list[Message],
        Field(
            max_length=MAX_MESSAGES, fail_fast=True, description="At least one; with context_id what is new, or none."
        ),
    ]
    max_completion_tokens: (
        Annotated[int, Field(ge=1, description="An upper bound; wins over max_tokens, its older name."), WHOLE] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        Field(
            description="Shown to the model by its chat template, or where that has no place for them in the system "
            "message; see `tools` in the usage."
        ),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Field(
            description="With 'none' the tools are not shown; 'required' and a named function bring a call for sure."
        ),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Whether an answer may have several calls.")] = None
    response_format: only(  # type: ignore[valid-type]
        None, {"type": "text"}, why="can only be {'type': 'text'}: answers are not constrained here"
    ) = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        Field(description="Given to the chat template."),
    ] = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Field(description=IGNORED)] = None
    metadata: Annotated[Metadata | None, Field(description=IGNORED)] = None
    safety_identifier: Annotated[Label | None, Field(description=IGNORED)] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None, Field(description=IGNORED)
    ] = None
    prediction: Annotated[Prediction | None, Field(description=IGNORED)] = None
    include_plan: Annotated[
        bool, Field(description="Let the usage say for every span of the prompt where its KV came from.")
    ] = False
    modalities: only(  # type: ignore[valid-type]
        None, ["text"], why="can only be ['text']: this model writes text"
    ) = None
    audio: only(None, why="is not supported: this model writes text") = None  # type: ignore[valid-type]
    functions: only(None, why="is not supported; use tools") = None  # type: ignore[valid-type]
    function_call: only(None, why="is not supported; use tool_choice") = None  # type: ignore[valid-type]
    moderation: only(None, why="is not supported; leave it out") = None  # type: ignore[valid-type]
    web_search_options: only(  # type: ignore[valid-type]
        None, why="is not supported; leave it out"
    ) = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        require_stream(self)
        if not self.messages and self.context_id is None:
            raise PydanticCustomError(
                "needs", "{param} should have at least 1 item without context_id", {"param": "messages"}
            )
        if self.tool_choice not in (None, "auto", "none") and not self.tools and self.context_id is None:
            raise PydanticCustomError("needs", "{param} is only allowed with tools", {"param": "tool_choice"})
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "needs", "{param} is only allowed when logprobs is true", {"param": "top_logprobs"}
            )
        return self

    @property
    def choice_of_tools(self) -> Choice:
        """What the answer may call."""
        is_parallel, given = self.parallel_tool_calls is not False, self.tool_choice
        if isinstance(given, NamedTool):
            return Choice("required", (given.function.name,), is_parallel=False)
        if isinstance(given, AllowedToolsChoice):
            names = tuple(tool.function.name for tool in given.allowed_tools.tools)
            return Choice(given.allowed_tools.mode, names, is_parallel)
        return Choice(given or "auto", None, is_parallel)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of an answer at most, if the client says."""
        return self.max_completion_tokens or self.max_tokens


class TopLogprob(ResponseModel):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was drawn, under the model before any shaping."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseModel):
    """Of a choice or a piece of it."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AnsweredFunction(ResponseModel):
    """Which function, with which arguments as JSON text."""

    name: str
    arguments: str


class AnsweredCall(ResponseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnswerMessage(ResponseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: Annotated[str | None, Field(description="Null where there are only calls.")]
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None
    reasoning_content: Annotated[str | None, Field(description="What the model thought before.")] = None
    reasoning: Annotated[str | None, Field(description="The same by its other name.")] = None


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(ResponseModel):
    """The answers to one conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(ResponseModel):
    """A call's name at first, then its arguments piece by piece."""

    name: str | None = None
    arguments: str | None = None


class CallDelta(ResponseModel):
    """What is new about a call; all but the index and the arguments comes once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(ResponseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(ResponseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(ResponseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
