"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, WithJsonSchema, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.engine.chat_template import RESERVED
from kvcomm.server.schemas.common import (
    IGNORED,
    WHOLE,
    GenerationRequest,
    Label,
    NumLogprobs,
    RequestModel,
    ResponseModel,
    context_rule,
    needs,
    only,
)
from kvcomm.server.schemas.logprobs import PromptLogprobs
from kvcomm.server.schemas.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AllowedToolsChoice,
    NamedTool,
    RequestMessage,
    Tool,
    ToolChoiceInput,
)
from kvcomm.server.schemas.segments import SegmentedRequest
from kvcomm.server.schemas.structured import StructuredFields
from kvcomm.server.schemas.usage import RunningUsage, UsageObject
from kvcomm.toolcalls.choice import ToolChoice

FinishReason = Literal["stop", "length", "tool_calls"]

MetadataName = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=16)]
Prediction = Annotated[dict[str, Any], Field(max_length=16)]

NEEDS_STREAM: JsonDict = {
    "if": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    "then": {"properties": {"prompt_logprobs": {"type": "null"}}},
    "else": {"properties": {"stream_options": {"type": "null"}}},
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
CONTEXT = context_rule(
    behind={"add_generation_prompt": {"enum": [None, True]}, "continue_final_message": {"enum": [None, False]}},
    stored={},
    without={"messages": {"minItems": 1}},
)
ONE_END: JsonDict = {
    "if": {"properties": {"continue_final_message": {"const": True}}, "required": ["continue_final_message"]},
    "then": {"properties": {"add_generation_prompt": {"enum": [None, False]}}},
}
RULES: list[JsonValue] = [NEEDS_STREAM, NEEDS_LOGPROBS, CONTEXT]


def _require_free(name: str) -> str:
    if name in RESERVED:
        raise PydanticCustomError("unsupported", "is not a variable that a request may set")
    return name


Variable = Annotated[
    str,
    Field(max_length=64),
    AfterValidator(_require_free),
    WithJsonSchema({"type": "string", "maxLength": 64, "not": {"enum": sorted(RESERVED)}}),
]
Variables = Annotated[
    dict[Variable, Any],
    Field(max_length=64, description="Variables for the chat template, such as enable_thinking."),
]


class TemplateFields(RequestModel):
    """How a conversation is rendered, besides its messages."""

    add_generation_prompt: Annotated[
        bool | None, Field(description="False: put no beginning of an answer behind the messages.")
    ] = None
    continue_final_message: Annotated[
        bool | None,
        Field(description="Let the answer go on with the last message, of which it holds only what is new."),
    ] = None
    chat_template_kwargs: Variables | None = None

    @model_validator(mode="after")
    def _check_end(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise needs("add_generation_prompt", "is not true with continue_final_message: that begins no new answer")
        return self

    @property
    def speaks(self) -> bool:
        """Whether the beginning of an answer stands behind the messages."""
        return self.add_generation_prompt is not False and not self.continue_final_message


def require_stream(request: GenerationRequest) -> None:
    """OpenAI's rule: `stream_options` only with `stream`."""
    if request.stream_options is not None and not request.stream:
        raise needs("stream_options", "is only allowed when stream is true")


class ChatRequest(StructuredFields, TemplateFields, SegmentedRequest):
    """A conversation to be continued."""

    model_config = ConfigDict(json_schema_extra={"allOf": RULES})

    messages: Annotated[
        list[RequestMessage],
        Field(
            max_length=MAX_MESSAGES, fail_fast=True, description="At least one; with context_id what is new, or none."
        ),
    ]
    max_completion_tokens: (
        Annotated[int, Field(ge=1, description="An upper bound; wins over max_tokens, its older name."), WHOLE] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        Field(
            description="Shown to the model by its chat template, or where that has no place for them in the system "
            "message; see `tools` in the usage."
        ),
    ] = None
    tool_choice: Annotated[
        ToolChoiceInput | None,
        Field(
            description="With 'none' the tools are not shown; 'required' and a named function bring a call for sure."
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None,
        Field(
            description="Whether an answer may have several calls; by default it may, unless a call is required: then "
            "it is one."
        ),
    ] = None
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
            raise needs("messages", "should have at least 1 item without context_id")
        if self.tool_choice not in (None, "auto", "none") and not self.tools and self.context_id is None:
            raise needs("tool_choice", "is only allowed with tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise needs("top_logprobs", "is only allowed when logprobs is true")
        if self.context_id is not None and self.continue_final_message:
            raise needs("continue_final_message", "is not allowed with context_id; send all messages")
        if self.context_id is not None and self.add_generation_prompt is False:
            raise needs("add_generation_prompt", "is only true with context_id, where an answer has a place of its own")
        return self

    @property
    def choice_of_tools(self) -> ToolChoice:
        """What the answer may call."""
        given, names = self.tool_choice, None
        if isinstance(given, NamedTool):
            return ToolChoice("required", (given.function.name,), is_parallel=False)
        mode = given.allowed_tools.mode if isinstance(given, AllowedToolsChoice) else given or "auto"
        if isinstance(given, AllowedToolsChoice):
            names = tuple(tool.function.name for tool in given.allowed_tools.tools)
        # Small models that have to call something find no end where there may be more.
        is_parallel = mode != "required" if self.parallel_tool_calls is None else self.parallel_tool_calls
        return ToolChoice(mode, names, is_parallel)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of an answer at most, if the client says."""
        return self.max_completion_tokens or self.max_tokens


class ChatTopLogprob(ResponseModel):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatTopLogprob):
    """A token that was drawn, under the model before any shaping."""

    top_logprobs: list[ChatTopLogprob]


class ChoiceLogprobs(ResponseModel):
    """Log-probabilities of a choice or a piece of it."""

    content: list[ChatTokenLogprob] | None
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
    usage: UsageObject
    prompt_logprobs: PromptLogprobs | None = None


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
    usage: UsageObject | RunningUsage | None = None
