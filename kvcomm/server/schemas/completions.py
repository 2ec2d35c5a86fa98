"""`POST /v1/completions`: texts or token ids to be continued, without a chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.chat import NEEDS_STREAM, FinishReason, require_stream
from kvcomm.server.schemas.common import (
    MAX_IDS,
    ON_CONTEXT,
    ONE_STORED,
    TOKEN_ID,
    WHOLE,
    NonEmpty,
    ResponseModel,
    only,
)
from kvcomm.server.schemas.segments import SegmentedRequest
from kvcomm.server.schemas.usage import Usage

MAX_PROMPTS = 128


def _whole_ids(value: object) -> object:
    """As `WHOLE` does for one number, and as fast as a long list needs."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
    return value


TokenId = Annotated[int, Field(ge=0, json_schema_extra={"format": TOKEN_ID})]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True), BeforeValidator(_whole_ids)]


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


NEEDS_PROMPT: JsonDict = {
    "if": {"properties": {"context_id": {"type": "string"}}, "required": ["context_id"]},
    "else": {"properties": {"prompt": {"not": {"const": ""}}}},
}
ONE_STORED_PROMPT: JsonDict = {
    "if": {"properties": {"store": {"const": True}}, "required": ["store"]},
    "then": {
        "properties": {"prompt": {"not": {"type": "array", "items": {"type": ["array", "string"]}, "minItems": 2}}}
    },
}
RULES: list[JsonValue] = [NEEDS_STREAM, NEEDS_PROMPT, ON_CONTEXT, ONE_STORED, ONE_STORED_PROMPT]


class CompletionRequest(SegmentedRequest):
    """Prompts to be continued; control tokens spelled out in a text are control tokens."""

    model_config = ConfigDict(json_schema_extra={"allOf": RULES})

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    echo: only(  # type: ignore[valid-type]
        None, False, why="is not supported; put the prompt before the answer yourself"
    ) = None
    best_of: only(None, 1, why="is not supported; use n") = None  # type: ignore[valid-type]
    suffix: only(None, "", why="is not supported; leave it out") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        require_stream(self)
        if self.prompt == "" and self.context_id is None:
            raise PydanticCustomError("needs", "{param} is only empty with context_id", {"param": "prompt"})
        if self.store and len(self.prompts) > 1:
            raise PydanticCustomError("needs", "{param} is only one when store is true", {"param": "prompt"})
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt = cast("list[Any]", self.prompt)
        return [prompt] if isinstance(prompt[0], int) else prompt


class CompletionLogprobs(ResponseModel):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One continuation, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(ResponseModel):
    """The continuations, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
