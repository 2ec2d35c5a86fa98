"""Forty JSON schemas, of the kinds that the JSON-Schema test suite has, and whether answers validate.

Every kind of keyword that constrains answers comes up in several ways: types, enumerations, objects open and closed,
arrays, alternatives, references within the schema and recursive ones, patterns, formats, and bounds on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

WORD: Schema = {"type": "string", "maxLength": 24}


def _object(**properties: Any) -> dict[str, Any]:
    """A closed object; all its properties are required."""
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


SCHEMAS: Mapping[str, Schema] = {
    # types
    "string": _object(name=WORD),
    "integer": _object(count={"type": "integer", "minimum": 0, "maximum": 99999}),
    "number": _object(price={"type": "number", "minimum": 0, "maximum": 1000}),
    "boolean": _object(is_open={"type": "boolean"}),
    "null": _object(nothing={"type": "null"}),
    "several types": _object(value={"type": ["boolean", "null", "string"], "maxLength": 16}),
    "types of all kinds": _object(
        name=WORD, age={"type": "integer", "minimum": 0, "maximum": 130}, is_member={"type": "boolean"}
    ),
    # enum and const
    "enum": _object(color={"enum": ["red", "green", "blue"]}),
    "enum of mixed values": _object(value={"enum": [1, "two", None, True, [3], {"four": 4}]}),
    "const": _object(kind={"const": "city"}, name=WORD),
    "enum with escapes": _object(text={"enum": ['a "quoted" word', "a\nline", "back\\slash", "ünïcödé", "🙂"]}),
    # objects
    "optional properties": {
        "type": "object",
        "properties": {"name": WORD, "nickname": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "open object": {"type": "object", "properties": {"name": WORD}, "required": ["name"]},
    "additional properties of a type": {
        "type": "object",
        "properties": {"name": WORD},
        "required": ["name"],
        "additionalProperties": {"type": "boolean"},
    },
    "nested objects": _object(person=_object(name=_object(first=WORD, last=WORD), home=_object(city=WORD))),
    "names that need escapes": _object(**{'a "b"': WORD, "c\\d": WORD, "é": WORD}),
    "no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    # arrays
    "array": _object(tags={"type": "array", "items": WORD, "maxItems": 4}),
    "array of at least two": _object(tags={"type": "array", "items": WORD, "minItems": 2, "maxItems": 3}),
    "array of objects": _object(people={"type": "array", "items": _object(name=WORD), "minItems": 1, "maxItems": 3}),
    "array of arrays": _object(
        rows={
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
            "minItems": 1,
            "maxItems": 3,
        }
    ),
    "tuple": _object(pair={"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2}),
    "array at the root": {"type": "array", "items": {"enum": ["north", "south", "east", "west"]}, "maxItems": 4},
    # alternatives
    "any of types": _object(id={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 999}, WORD]}),
    "optional value": _object(note={"anyOf": [WORD, {"type": "null"}]}),
    "any of objects": {
        "anyOf": [_object(kind={"const": "cat"}, lives={"enum": [9]}), _object(kind={"const": "dog"}, name=WORD)]
    },
    "one of constants": {"oneOf": [{"const": "yes"}, {"const": "no"}]},
    "all of": _object(number={"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 99}]}),
    # references
    "definitions": {**_object(home={"$ref": "#/$defs/place"}), "$defs": {"place": _object(city=WORD)}},
    "old definitions": {**_object(home={"$ref": "#/definitions/place"}), "definitions": {"place": _object(city=WORD)}},
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": _object(name=WORD, children={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}),
            "leaf": {
                "anyOf": [_object(name=WORD), _object(only={"$ref": "#/$defs/leaf"}, depth={"enum": [1, 2]})],
            },
        },
    },
    # strings
    "pattern": _object(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern of alternatives": _object(size={"type": "string", "pattern": "^(small|medium|large)$"}),
    "lengths": _object(word={"type": "string", "minLength": 3, "maxLength": 8}),
    "date": _object(day={"type": "string", "format": "date"}),
    "date and time": _object(at={"type": "string", "format": "date-time"}),
    "uuid": _object(id={"type": "string", "format": "uuid"}),
    # numbers
    "bounds": _object(percent={"type": "integer", "minimum": 0, "maximum": 100}),
    "exclusive bounds": _object(share={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "multiples": _object(minutes={"type": "integer", "multipleOf": 15, "minimum": 0, "maximum": 45}),
}
"""By what they show. Strings and arrays end somewhere, as they have to in an answer of so many tokens."""


def error_of(schema: Schema, text: str) -> str | None:
    """Why an answer does not validate, by a validator of its own; None: it does."""
    from jsonschema import Draft202012Validator

    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return next((error.message for error in validator.iter_errors(value)), None)
