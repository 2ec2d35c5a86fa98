"""Chat messages and tools, as OpenAI documents them, for a model that reads and writes text.

Clients send back the messages that they got, from this server or another, with whatever was in them. So a message may
have fields that nobody documents; the chat template sees them. What would lose a part of what was said is refused:
content that is no text, and calls in an older form.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kvcomm.engine.chat import PASSAGE
from kvcomm.server.schemas.common import (
    IGNORED,
    CacheControl,
    Label,
    PromptCacheBreakpoint,
    RequestModel,
    one_or_many,
    only,
)
from kvcomm.server.schemas.segments import SEGMENT_NAME

MAX_MESSAGES, MAX_TOOLS = 4096, 1024
"""In one request."""

MAX_PARTS, MAX_CALLS = 1024, 256
"""Of one message."""

Name = Annotated[Label | None, Field(description="Given to the chat template.")]
ReplayedField = Annotated[Any, Field(description="As some clients send it back; has no effect here.")]
Reasoning = Annotated[
    str | None, Field(description="What it thought before; the chat template shows it or leaves it out.")
]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _require_text(part: object) -> object:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported", "is of type {kind}, which is not supported: this model reads text", {"kind": repr(kind[:60])}
        )
    return part


class TextPart(RequestModel):
    """A piece of text; several in a message are joined without anything in between."""

    type: Literal["text"]
    text: str
    name: Annotated[
        str | None,
        Field(
            pattern=SEGMENT_NAME,
            description="Makes the part a dynamic segment of this kind, tokenized alone: it may be moved to wherever "
            "else it stands. What else the request's messages say is then tokenized apart from the chat template.",
        ),
    ] = None
    dynamic: Annotated[
        bool | None, Field(description=f"The same without a name of its own (it is {PASSAGE!r}); false: no segment.")
    ] = None
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None
    id: ReplayedField = None
    index: ReplayedField = None
    annotations: ReplayedField = None
    citations: ReplayedField = None
    logprobs: ReplayedField = None

    @property
    def segment_name(self) -> str | None:
        """Name of the dynamic segment that the part is, or None."""
        is_dynamic = self.name is not None if self.dynamic is None else self.dynamic
        return (self.name or PASSAGE) if is_dynamic else None

    @property
    def breakpoints(self) -> tuple[CacheControl | PromptCacheBreakpoint, ...]:
        """Breakpoints at its end."""
        return tuple(each for each in (self.cache_control, self.prompt_cache_breakpoint) if each is not None)


ContentPart = Annotated[TextPart, BeforeValidator(_require_text)]
Content = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("many")],
    Discriminator(one_or_many),
]


class MessageModel(RequestModel):
    """Base of messages: the chat template sees what else is in them."""

    model_config = ConfigDict(extra="allow")

    id: ReplayedField = None

    @property
    def others(self) -> dict[str, Any]:
        """Fields that are not documented."""
        return dict(self.model_extra or {})


class SystemMessage(MessageModel):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: Name = None


class DeveloperMessage(MessageModel):
    """Instructions by their newer name; chat templates see a system message."""

    role: Literal["developer"]
    content: Content
    name: Name = None


class UserMessage(MessageModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name = None


class CalledFunction(RequestModel):
    """Which function, with which arguments as JSON text."""

    model_config = ConfigDict(extra="ignore")

    name: Label
    arguments: str


class ToolCall(RequestModel):
    """A call that the assistant made; clients keep more of its pieces than there was, such as their index."""

    model_config = ConfigDict(extra="ignore")

    id: Label
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(MessageModel):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    reasoning_content: Reasoning = None
    reasoning: Reasoning = None
    refusal: Annotated[str | None, Field(description=IGNORED)] = None
    annotations: Annotated[Annotated[list[Any], Field(max_length=MAX_PARTS)] | None, Field(description=IGNORED)] = None
    audio: only(None, why="is not supported: this model reads text") = None  # type: ignore[valid-type]
    function_call: only(None, why="is not supported; use tool_calls") = None  # type: ignore[valid-type]


class ToolMessage(MessageModel):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Label
    name: Name = None


RequestMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(RequestModel):
    """A function's signature; `parameters` is a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, Field(description="Arguments of calls follow the schema to the letter.")] = None


class Tool(RequestModel):
    """A tool that is shown to the model."""

    type: Literal["function"]
    function: Function
    cache_control: CacheControl | None = None


class FunctionName(RequestModel):
    """Which function."""

    name: ToolName


class NamedTool(RequestModel):
    """One of the request's tools."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestModel):
    """The tools that may be called; all are shown."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(RequestModel):
    """A choice among some of the request's tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", "mode")
    return kind if kind in ("function", "allowed_tools") else "function" if isinstance(value, dict) else "mode"


ToolChoiceInput = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("mode")]
    | Annotated[NamedTool, Tag("function")]
    | Annotated[AllowedToolsChoice, Tag("allowed_tools")],
    Discriminator(_kind_of_choice),
]
