"""From the fields of a request to the grammar of its answers, compiled where the request is prepared.

For worker threads: what compiles here is found again when the engine makes its request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvcomm.engine.engine import Engine
from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.structured import JsonObjectFormat, JsonSchemaFormat, StructuredFields, StructuredOutputs

GivenT = TypeVar("GivenT")
Made = TypeVar("Made")


def grammar_of(body: StructuredFields) -> Grammar | None:
    """What the answers to a request have to look like; None: as the model likes.

    Raises:
        ApiError: 400 for a schema that is none or too large; names the field.
    """
    if body.structured_outputs is not None:
        return _of_outputs(body.structured_outputs)
    if body.regex is not None:
        return _made("regex", Grammar.regex, body.regex)
    if isinstance(body.response_format, JsonObjectFormat):
        return Grammar.json_object()
    if isinstance(body.response_format, JsonSchemaFormat):
        wanted = body.response_format.json_schema
        schema = {"type": "object"} if wanted.schema_ is None else wanted.schema_
        is_strict = wanted.strict is not False
        return _made("response_format", lambda each: Grammar.json_schema(each, strict=is_strict), schema)
    return None


def field_of(body: StructuredFields) -> str:
    """The field that asks for a grammar, for errors about it."""
    if body.structured_outputs is not None:
        return "structured_outputs"
    return "regex" if body.regex is not None else "response_format"


def compile_grammar(engine: Engine, grammar: Grammar, *, space: str, param: str) -> None:
    """Compile a grammar for a tenant of the engine, which keeps it.

    Raises:
        ApiError: 400 for one that cannot be enforced, that costs too much, or that nothing satisfies.
    """
    _made(param, lambda each: engine.grammars.compile(each, owner=space), grammar)


def _of_outputs(wanted: StructuredOutputs) -> Grammar:
    if wanted.json_ is not None:
        return _made("structured_outputs.json", Grammar.json_schema, wanted.json_)
    if wanted.regex is not None:
        return _made("structured_outputs.regex", Grammar.regex, wanted.regex)
    if wanted.choice is not None:
        return _made("structured_outputs.choice", Grammar.choice, wanted.choice)
    if wanted.grammar is not None:
        return _made("structured_outputs.grammar", Grammar.lark, wanted.grammar)
    return Grammar.json_object()


def _made(param: str, make: Callable[[GivenT], Made], given: GivenT) -> Made:
    """What is made of a field's value, or the answer that names the field."""
    try:
        return make(given)
    except InvalidRequest as error:
        raise ApiError(400, "invalid_value", f"{param}: {error}", param=param) from error
