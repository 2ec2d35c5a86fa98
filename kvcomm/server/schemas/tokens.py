"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in the shapes of vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from kvcomm.server.schemas.chat import ONE_END, TemplateFields
from kvcomm.server.schemas.common import MODEL_NAME, Body, Label, ResponseModel
from kvcomm.server.schemas.completions import MaybeIds
from kvcomm.server.schemas.contexts import given
from kvcomm.server.schemas.messages import MAX_MESSAGES, MAX_TOOLS, RequestMessage, Tool

ModelName = Annotated[Label, Field(json_schema_extra={"format": MODEL_NAME})]
ONE_SOURCE: JsonDict = {
    "oneOf": [given("prompt"), given("messages")],
    "if": given("tools"),
    "then": given("messages"),
}
RULES: list[JsonValue] = [ONE_SOURCE, ONE_END]


class TokenizeRequest(TemplateFields, Body):
    """A text or a conversation; its tokens are those that a request with it would have."""

    model_config = ConfigDict(json_schema_extra={"allOf": RULES})

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        None
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: Annotated[
        bool | None, Field(description="Of a prompt: false leaves out what the tokenizer puts before texts.")
    ] = None
    return_token_strs: Annotated[bool | None, Field(description="The tokens as the vocabulary has them, too.")] = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("source", "give exactly one of prompt and messages")
        if self.tools is not None and self.messages is None:
            raise PydanticCustomError("needs", "{param} is only allowed with messages", {"param": "tools"})
        return self


class Tokenized(ResponseModel):
    """Token ids, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: ModelName | None = None
    tokens: MaybeIds


class Detokenized(ResponseModel):
    """Their text, special tokens included."""

    prompt: str


class TokenizerInfo(ResponseModel):
    """What evaluation harnesses want to know before they have the server tokenize for them."""

    tokenizer_class: str
    model_max_length: Annotated[int, Field(description="Tokens that the model takes.")]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: Annotated[str | None, Field(description="In Jinja's language; null where there is none.")]
