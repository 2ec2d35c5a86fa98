"""`POST /v1/completions`: texts or token ids to be continued, without a chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic.config import JsonDict

from kvcomm.server.schemas.chat import NEEDS_STREAM, FinishReason, require_stream
from kvcomm.server.schemas.common import (
    MAX_IDS,
    TOKEN_ID,
    WHOLE,
    NonEmpty,
    NumLogprobs,
    ResponseModel,
    context_rule,
    needs,
    only,
)
from kvcomm.server.schemas.logprobs import PromptLogprobs
from kvcomm.server.schemas.segments import SegmentedRequest
from kvcomm.server.schemas.structured import StructuredFields
from kvcomm.server.schemas.usage import RunningUsage, UsageObject

MAX_PROMPTS = 128

DEFAULT_MAX_TOKENS = 16
"""Of an answer, as OpenAI documents it."""


def _whole_ids(value: object) -> object:
    """As `WHOLE` does for one number, and as fast as a long list needs."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
    return value


TokenId = Annotated[int, Field(ge=0, json_schema_extra={"format": TOKEN_ID})]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True), BeforeValidator(_whole_ids)]
MaybeIds = Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True), BeforeValidator(_whole_ids)]


def _form(value: object) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "batches" if isinstance(first, list) else "ids"


Prompts = Annotated[
    Annotated[str, Field(description="May be empty with context_id."), Tag("text")]
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("batches")],
    Discriminator(_form),
]


CONTEXT = context_rule(
    behind={"echo": {"enum": [None, False]}},
    stored={"prompt": {"not": {"type": "array", "items": {"type": ["array", "string"]}, "minItems": 2}}},
    without={"prompt": {"not": {"const": ""}}},
)
PLAIN_ECHO: JsonDict = {
    "if": {"properties": {"echo": {"const": True}}, "required": ["echo"]},
    "then": {"properties": {"segments": {"type": ["null", "array"], "maxItems": 0}}},
}
RULES: list[JsonValue] = [NEEDS_STREAM, CONTEXT, PLAIN_ECHO]


class CompletionRequest(StructuredFields, SegmentedRequest):
    """Prompts to be continued; control tokens spelled out in a text are control tokens."""

    model_config = ConfigDict(json_schema_extra={"allOf": RULES})

    prompt: Prompts
    max_tokens: (
        Annotated[
            int,
            Field(ge=0, description=f"An upper bound; {DEFAULT_MAX_TOKENS} unless said. 0: only the prompt is read."),
            WHOLE,
        ]
        | None
    ) = None
    logprobs: Annotated[
        NumLogprobs | None,
        Field(description="Log-probabilities of the answer's tokens, with echo of the prompt's, and so many others."),
    ] = None
    echo: Annotated[
        bool | None, Field(description="Put the prompt before the answer. Not with context_id or segments.")
    ] = None
    best_of: only(None, 1, why="is not supported; use n") = None  # type: ignore[valid-type]
    suffix: only(None, "", why="is not supported; leave it out") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        require_stream(self)
        if self.prompt == "" and self.context_id is None:
            raise needs("prompt", "is only empty with context_id")
        if self.is_stored and len(self.prompts) > 1:
            raise needs("prompt", "is only one when store is true")
        if self.echo and self.context_id is not None:
            raise needs("echo", "is not allowed with context_id: what a context holds is not in the answer")
        if self.echo and self.segments:
            raise needs("echo", "is not allowed with segments; put their texts into the prompt")
        return self

    @property
    def wanted_tokens(self) -> int:
        """Tokens of an answer at most."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to tokens of the prompt that are to be reported; None: nothing about them."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((num for num in wanted if num is not None), default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt = cast("list[Any]", self.prompt)
        return [prompt] if isinstance(prompt[0], int) else prompt


class CompletionLogprobs(ResponseModel):
    """Parallel lists, one entry per token that has put text into the answer, also where a stop string cut it.

    With echo the prompt's tokens stand before them, and behind them the end token, if one was drawn.
    """

    tokens: Annotated[
        list[str],
        Field(
            description="Their texts; `bytes:\\xf0\\x9f` of a part of a character, `token_id:7` where a more probable "
            "alternative has the same text."
        ),
    ]
    token_logprobs: Annotated[list[float | None], Field(description="Null for the first token of a prompt.")]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: Annotated[
        list[int], Field(description="Characters of the text before the token's; parts of a character have its place.")
    ]


class CompletionChoice(ResponseModel):
    """One continuation, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(ResponseModel):
    """The continuations, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageObject | RunningUsage | None = None
