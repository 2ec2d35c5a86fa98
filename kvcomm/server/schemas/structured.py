"""What answers have to look like: OpenAI's `response_format`, vLLM's `structured_outputs`, SGLang's `regex`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from kvcomm.engine.grammar import MAX_CHOICE_LETTERS, MAX_CHOICES, MAX_LARK, MAX_REGEX
from kvcomm.engine.grammar_schema import MAX_SCHEMA
from kvcomm.server.schemas.common import IGNORED, Label, RequestModel, needs

REGEX, LARK, SCHEMA = "rust-regex", "lark-grammar", "json-schema"
"""Formats of texts that have to be more than texts."""

NOT_ONE = "can only be one of response_format, structured_outputs and regex"

Regex = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_REGEX,
        description="Matches the whole answer. Rust's syntax: no look-around, no back references.",
        json_schema_extra={"format": REGEX},
    ),
]
Schema = Annotated[
    dict[str, Any], Field(description="What cannot be enforced is refused by name, unless strict is false.")
]
SchemaText = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA, json_schema_extra={"format": SCHEMA})]
ChoiceText = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_LETTERS)]


class TextFormat(RequestModel):
    """Any answer."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON schema, and what it is called."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[Label | None, Field(description=IGNORED)] = None
    description: Annotated[Label | None, Field(description=IGNORED)] = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: Annotated[
        bool | None, Field(description="False: leave out what cannot be enforced, instead of refusing the request.")
    ] = None


class JsonSchemaFormat(RequestModel):
    """JSON that validates against a schema; any object without one."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]

KINDS: Mapping[str, JsonDict] = {
    "json": {"type": ["object", "string"]},
    "regex": {"type": "string"},
    "choice": {"type": "array"},
    "grammar": {"type": "string"},
    "json_object": {"const": True},
}
"""What can be asked for, and the values that do ask for it."""


def _only(kind: str) -> JsonDict:
    others: JsonDict = {
        other: {"enum": [None, False]} if other == "json_object" else {"type": "null"} for other in KINDS
    }
    return {"required": [kind], "properties": others | {kind: KINDS[kind]}}


class StructuredOutputs(RequestModel):
    """vLLM's: exactly one of these."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_only(kind) for kind in KINDS]})

    json_: Annotated[Schema | SchemaText | None, Field(alias="json", description="A JSON schema.")] = None
    regex: Regex | None = None
    choice: Annotated[list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None
    grammar: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_LARK)] | None,
        Field(
            description="In llguidance's dialect of Lark; control tokens come up where it names them.",
            json_schema_extra={"format": LARK},
        ),
    ] = None
    json_object: bool | None = None
    disable_any_whitespace: Annotated[bool | None, Field(description="Accepted; JSON comes on one line anyway.")] = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        given = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(each is not None for each in given) != 1:
            raise needs("structured_outputs", f"holds exactly one of {', '.join(KINDS)}")
        return self


class StructuredFields(RequestModel):
    """Fields of a request that say what its answers have to look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: Regex | None = None

    @model_validator(mode="after")
    def _check_forms(self) -> StructuredFields:
        wanted = [
            name
            for name in ("response_format", "structured_outputs", "regex")
            if getattr(self, name) is not None and not isinstance(getattr(self, name), TextFormat)
        ]
        if len(wanted) > 1:
            raise needs(wanted[-1], NOT_ONE)
        return self
