"""`/v1/messages`: requests as Anthropic documents them, for a model that reads and writes text.

Fields of Anthropic's that have no effect here are accepted and say so; what would change the answer is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.common import (
    MAX_STOPS,
    MODEL_NAME,
    WHOLE,
    Body,
    CacheControl,
    Label,
    RequestModel,
    ReuseOptions,
    Salt,
    StopText,
    one_or_many,
    only,
)
from kvcomm.server.schemas.messages import MAX_CALLS, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, ToolName

IGNORED = "Accepted as Anthropic documents it; has no effect here."
NO = "is not supported; leave it out"
NO_THREAD = "is not supported: conversations are not kept here; send all messages"
MAX_TURNS = MAX_MESSAGES - 1
"""Messages of one request; `system`, and each result of a call, is one more."""

Ignored = Annotated[Any, Field(description=IGNORED)]


def _of_type(*kinds: str, default: str = "") -> BeforeValidator:
    """Refuses by name what is of another `type`."""

    def check(value: object) -> object:
        kind = (value.get("type") or default) if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            raise PydanticCustomError(
                "unsupported",
                "is of type {kind}, which is not supported: this model reads text",
                {"kind": repr(kind[:60])},
            )
        return value

    return BeforeValidator(check)


class TextBlock(RequestModel):
    """A piece of text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Annotated[list[Any], Field(max_length=MAX_PARTS)] | None, Field(description=IGNORED)] = None


class ThinkingBlock(RequestModel):
    """What the model thought in an earlier answer; given to the chat template."""

    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, Field(description=IGNORED)] = None


class RedactedThinkingBlock(RequestModel):
    """Thoughts that only Anthropic can read: left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(RequestModel):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Label
    name: Label
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Ignored = None
    toolset_name: only(None, why=NO) = None  # type: ignore[valid-type]


TextOrBlocks = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[Annotated[TextBlock, _of_type("text")]], Field(max_length=MAX_PARTS, fail_fast=True), Tag("many")],
    Discriminator(one_or_many),
]


class ToolResultBlock(RequestModel):
    """The result of a call; of one that failed, the model is told that it did."""

    type: Literal["tool_result"]
    tool_use_id: Label
    content: TextOrBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: only(None, why=NO) = None  # type: ignore[valid-type]


UserBlock = Annotated[
    Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")], _of_type("text", "tool_result")
]
AssistantBlock = Annotated[
    Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")],
    _of_type("text", "thinking", "redacted_thinking", "tool_use"),
]


class UserTurn(RequestModel):
    """What the user says, and results of calls."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_CALLS, fail_fast=True), Tag("many")],
        Discriminator(one_or_many),
    ]


class AssistantTurn(RequestModel):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[list[AssistantBlock], Field(min_length=1, max_length=MAX_CALLS, fail_fast=True), Tag("many")],
        Discriminator(one_or_many),
    ]


class SystemTurn(RequestModel):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: TextOrBlocks


MessageTurn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class ClientTool(RequestModel):
    """A tool that the client runs; `input_schema` is a JSON schema."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    input_examples: Annotated[
        Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS)] | None, Field(description=IGNORED)
    ] = None
    eager_input_streaming: Annotated[bool | None, Field(description=IGNORED)] = None
    allowed_callers: Annotated[list[Label] | None, Field(max_length=8, description=IGNORED)] = None
    defer_loading: only(None, False, why=NO) = None  # type: ignore[valid-type]


class GeneralToolChoice(RequestModel):
    """Whether a tool is to be used: as the model likes, any, none, or one by name."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(RequestModel):
    """One tool is to be used."""

    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    """Whether to think; given to the chat template as `enable_thinking` and `thinking`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[
        Annotated[int, Field(ge=1), WHOLE] | None, Field(description="Has no effect: max_tokens bounds all.")
    ] = None
    display: Annotated[Literal["summarized", "omitted"] | None, Field(description=IGNORED)] = None


class OutputFormat(RequestModel):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestModel):
    """What the answer should be like."""

    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None, Field(description="Given to the chat template.")
    ] = None
    format: OutputFormat | None = None


class RequestMetadata(RequestModel):
    """Who asks."""

    user_id: Annotated[Label | None, Field(description=IGNORED)] = None


NEEDS_TOOLS: JsonDict = {
    "if": {
        "properties": {"tool_choice": {"properties": {"type": {"enum": ["any", "tool"]}}, "type": "object"}},
        "required": ["tool_choice"],
    },
    "then": {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
}


class MessagesPrompt(Body):
    """What is answered, and what is counted of it."""

    model_config = ConfigDict(json_schema_extra={"allOf": [NEEDS_TOOLS]})

    model: Annotated[Label, Field(json_schema_extra={"format": MODEL_NAME})]
    messages: Annotated[
        list[MessageTurn],
        Field(
            min_length=1,
            max_length=MAX_TURNS,
            fail_fast=True,
            description="Where the last one is the assistant's, the answer goes on with it.",
        ),
    ]
    system: Annotated[TextOrBlocks | None, Field(description="Instructions before everything else.")] = None
    tools: (
        Annotated[
            list[Annotated[ClientTool, _of_type("custom", default="custom")]],
            Field(max_length=MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: Annotated[GeneralToolChoice | NamedToolChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[
        CacheControl | None, Field(description="A breakpoint at the end of the request; its `ttl` counts.")
    ] = None
    speed: Annotated[Literal["standard", "fast"] | None, Field(description=IGNORED)] = None
    thread: Annotated[Any, WithJsonSchema({"enum": [None], "description": NO_THREAD})] = None
    context_management: only(None, why=NO) = None  # type: ignore[valid-type]
    mcp_servers: only(None, [], why=NO) = None  # type: ignore[valid-type]


class MessagesRequest(MessagesPrompt):
    """A conversation to be continued."""

    max_tokens: Annotated[int, Field(ge=1, description="An upper bound; the server has others."), WHOLE]
    stream: bool | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, description="Keep the k most probable tokens; 0 is off."), WHOLE] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: RequestMetadata | None = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, Field(description=IGNORED)] = None
    inference_geo: Annotated[Label | None, Field(description=IGNORED)] = None
    container: only(None, why=NO) = None  # type: ignore[valid-type]
    diagnostics: Annotated[dict[str, Any] | None, Field(max_length=8, description=IGNORED)] = None

    seed: Annotated[int, WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    ignore_eos: Annotated[bool, Field(description="Go on after the model's end tokens.")] | None = None
    cache_salt: Salt | None = None
    reuse: ReuseOptions | None = None
