"""`/v1/responses`: requests, and the responses that answer them.

`store` keeps a response as a context: its id is that of the context with `resp_` in place of `ctx_`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.config import JsonDict

from kvcomm.server.schemas.chat import NEEDS_STREAM, NEEDS_TOOLS, Metadata
from kvcomm.server.schemas.common import (
    IGNORED,
    MODEL_NAME,
    WHOLE,
    Body,
    Label,
    PromptCacheOptions,
    RequestModel,
    ResponseModel,
    ReuseOptions,
    Salt,
    Stop,
    needs,
    one_or_many,
    only,
)
from kvcomm.server.schemas.messages import MAX_MESSAGES, MAX_TOOLS, ToolName
from kvcomm.server.schemas.response_items import Item, OutputItem, ResponseStatus
from kvcomm.server.schemas.structured import JsonObjectFormat, TextFormat
from kvcomm.server.schemas.usage import UsageObject

RESPONSE_ID = r"^resp_[0-9a-f]{24}$"
MAX_ITEMS = MAX_MESSAGES - 1
"""In one request: instructions are one more."""

Input = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("many")],
    Discriminator(one_or_many),
]
Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
LOGPROBS: Includable = "message.output_text.logprobs"


class FunctionTool(RequestModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: Annotated[dict[str, Any] | None, Field(description=IGNORED)] = None
    defer_loading: only(None, False, why="is not supported; leave it out") = None  # type: ignore[valid-type]
    allowed_callers: Annotated[list[Label] | None, Field(max_length=8, description=IGNORED)] = None


class NamedFunction(RequestModel):
    """A function by its name."""

    type: Literal["function"]
    name: ToolName


class AllowedFunctions(RequestModel):
    """Only some of the tools may be called, or one of them must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _form_of_choice(value: object) -> str:
    if isinstance(value, str):
        return "word"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "allowed" if kind == "allowed_tools" else "named"


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedFunction, Tag("named")]
    | Annotated[AllowedFunctions, Tag("allowed")],
    Discriminator(_form_of_choice),
]


class SchemaFormat(RequestModel):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    name: ToolName
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


TextOutputFormat = Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")]


class TextOptions(RequestModel):
    """What the text should be like."""

    format: TextOutputFormat | None = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Field(description=IGNORED)] = None


class ReasoningOptions(RequestModel):
    """How much to think."""

    effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        Field(description="Given to the chat template."),
    ] = None
    summary: Annotated[
        Literal["auto", "concise", "detailed"] | None,
        Field(description="Has no effect: thoughts are given as they are, not as a summary."),
    ] = None
    generate_summary: Annotated[Literal["auto", "concise", "detailed"] | None, Field(description=IGNORED)] = None
    context: Annotated[Literal["auto", "current_turn", "all_turns"] | None, Field(description=IGNORED)] = None
    mode: Annotated[Label | None, Field(description=IGNORED)] = None


class ResponseStreamOptions(RequestModel):
    """What a stream holds besides the answer."""

    include_obfuscation: Annotated[bool | None, Field(description=IGNORED)] = None


NO = "is not supported; leave it out"


class ResponsePrompt(Body):
    """What is answered, and what is counted of it."""

    model_config = ConfigDict(json_schema_extra={"allOf": [NEEDS_TOOLS]})

    model: Annotated[Label, Field(json_schema_extra={"format": MODEL_NAME})]
    input: Annotated[Input, Field(description="What is new; with previous_response_id it continues that response.")]
    instructions: Annotated[
        str | None, Field(description="A system message before everything else; not carried over to later responses.")
    ] = None
    previous_response_id: (
        Annotated[str, Field(pattern=RESPONSE_ID, description="A stored response that the input follows.")] | None
    ) = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field(description="Has no effect: what is too long is refused, nothing of it is left out."),
    ] = None
    conversation: only(None, why="is not supported; use previous_response_id") = None  # type: ignore[valid-type]


OWN_SALT: JsonDict = {
    "if": {"properties": {"previous_response_id": {"type": "string"}}, "required": ["previous_response_id"]},
    "then": {"properties": {"cache_salt": {"type": "null"}}},
}


class ResponseRequest(ResponsePrompt):
    """A conversation to be continued."""

    model_config = ConfigDict(json_schema_extra={"allOf": [NEEDS_STREAM, NEEDS_TOOLS, OWN_SALT]})

    max_output_tokens: (
        Annotated[int, Field(ge=1, description="An upper bound; the server has others."), WHOLE] | None
    ) = None
    store: Annotated[
        bool | None,
        Field(
            description="Keep the response as a context, under their rules of lifetime and quota. Where this is not "
            "said, it is kept while there is room, and makes room for others."
        ),
    ] = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    include: Annotated[
        Annotated[list[Includable], Field(max_length=16, fail_fast=True)] | None,
        Field(description="Log-probabilities of the text; what else it may name has no effect."),
    ] = None
    metadata: Annotated[Metadata | None, Field(description="Told with the response.")] = None
    max_tool_calls: Annotated[
        Annotated[int, Field(ge=1), WHOLE] | None,
        Field(description="Has no effect: it counts calls of built-in tools, of which there are none."),
    ] = None
    prompt_cache_key: Annotated[
        Label | None, Field(description="Accepted; there is one cache, which needs no routing. Not a salt.")
    ] = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"] | None, Field(description=IGNORED)] = None
    safety_identifier: Annotated[Label | None, Field(description=IGNORED)] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None, Field(description=IGNORED)
    ] = None
    user: Annotated[Label | None, Field(description=IGNORED)] = None
    background: only(None, False, why="can only be false: answers are waited for") = None  # type: ignore[valid-type]
    prompt: only(None, why="is not supported: prompts are not kept here") = None  # type: ignore[valid-type]
    moderation: only(None, why=NO) = None  # type: ignore[valid-type]
    context_management: only(None, [], why=NO) = None  # type: ignore[valid-type]

    seed: Annotated[int, WHOLE] | None = None
    stop: Stop | None = None
    top_k: (
        Annotated[int, Field(ge=-1, description="Keep the k most probable tokens; 0 and -1 are off."), WHOLE] | None
    ) = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    ignore_eos: Annotated[bool, Field(description="Go on after the model's end tokens.")] | None = None
    cache_salt: Salt | None = None
    reuse: ReuseOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise needs("stream_options", "is only allowed when stream is true")
        if self.previous_response_id is not None and self.cache_salt is not None:
            raise needs("cache_salt", "is not allowed with previous_response_id: that response has its own")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the text are told."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


class InputTokensDetails(ResponseModel):
    """OpenAI's view of the cache."""

    cached_tokens: Annotated[int, Field(ge=0, description="Reused exactly; the same as cached_prefix_tokens.")]
    cache_write_tokens: Annotated[int, Field(ge=0, description="Computed, and cached from now on.")]


class OutputTokensDetails(ResponseModel):
    """What the answer's tokens were spent on."""

    reasoning_tokens: Annotated[int, Field(ge=0)]


class ResponseUsage(UsageObject):
    """Counts under the Responses API's names, and all that chat completions tell."""

    input_tokens_details: InputTokensDetails
    output_tokens_details: OutputTokensDetails


class IncompleteDetails(ResponseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(ResponseModel):
    """What ended a response."""

    code: str
    message: str


class ResponseObject(ResponseModel):
    """A response, and the settings that it was made with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal[ResponseStatus, "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    instructions: str | None
    previous_response_id: str | None
    store: Annotated[bool, Field(description="Whether it was kept, which lasts as long as a context does.")]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    prompt_cache_key: str | None
    safety_identifier: str | None
    user: str | None


class ItemList(ResponseModel):
    """Items of a conversation, with the ids that they are told by."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(ResponseModel):
    """What is no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(ResponseModel):
    """How long a prompt is."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
