"""JSON schemas before they are enforced: read, measured, and closed.

The limits keep compiling short: the time that a schema takes grows with its size, in an object faster than that, and
chains of references are followed on the stack. Closing keeps answers short: a model that may always add one more
property often does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvcomm.errors import InvalidRequest
from kvcomm.values import told

MAX_SCHEMA = 131_072
"""Characters of a schema as JSON."""

MAX_REFERENCES, MAX_LEVELS, MAX_PROPERTIES = 500, 64, 1000
"""References in a schema, levels of nesting, and properties of one object."""

WRITING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes: a model that may choose its spaces, small ones above all, writes nothing else any more."""

_OF_MANY = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_OF_ONE = ("items", "additionalProperties", "additionalItems", "not", "if", "contains")


def prepared_schema(schema: Mapping[str, object] | bool | str, *, strict: bool) -> str:
    """A schema as JSON, with how its answers are written and what is left out where it is not strict.

    Raises:
        InvalidRequest: it is none, or too large.
    """
    found = _read(schema)
    _require_small(found)
    root = _closed(found) if _may_close(found) else found
    return json.dumps({**root, "x-guidance": {**WRITING, "lenient": not strict}})


def _read(schema: object) -> dict[str, Any]:
    """The schema as plain objects."""
    if isinstance(schema, bool | str | Mapping):
        try:
            source = schema if isinstance(schema, str) else json.dumps(_plain(schema), allow_nan=False)
            if len(source) > MAX_SCHEMA:
                raise InvalidRequest(f"the JSON schema has {len(source)} characters; the most are {MAX_SCHEMA}")
            found = json.loads(source, parse_constant=_refuse_constant)
        except RecursionError:
            raise InvalidRequest(f"the JSON schema has more than {MAX_LEVELS} levels") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"the JSON schema is no JSON: {error}") from None
        if found is True:
            return {}
        if isinstance(found, dict):
            return found
    raise InvalidRequest(f"a JSON schema must be an object, or true, not {told(schema)}")


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _require_small(schema: dict[str, Any]) -> None:
    """Raises InvalidRequest for one that would take long to compile."""
    num_references = num_levels = 0
    level: list[Any] = [schema]
    while level:
        num_levels += 1
        if num_levels > MAX_LEVELS:
            raise InvalidRequest(f"the JSON schema has more than {MAX_LEVELS} levels")
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                num_references += "$ref" in each
                properties = each.get("properties")
                if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                    raise InvalidRequest(
                        f"the JSON schema has an object of {len(properties)} properties; the most are {MAX_PROPERTIES}"
                    )
                below += each.values()
            else:
                below += each
        level = [each for each in below if isinstance(each, dict | list)]
    if num_references > MAX_REFERENCES:
        raise InvalidRequest(f"the JSON schema has {num_references} references ($ref); the most are {MAX_REFERENCES}")


def _may_close(schema: dict[str, Any]) -> bool:
    """Whether no two parts of the schema speak about the properties of one object, which the other may not forbid."""
    for node in _nodes(schema):
        if node.keys() & {"allOf", "not", "if", "contains"}:
            return False
        if node.keys() & {"properties", "required"} and node.keys() & {"anyOf", "oneOf", "$ref"}:
            return False
    return True


def _nodes(schema: object) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in _OF_MANY:
        if isinstance(schema.get(key), dict):
            for each in schema[key].values():
                yield from _nodes(each)
    for key in _OF_LIST:
        if isinstance(schema.get(key), list):
            for each in schema[key]:
                yield from _nodes(each)
    for key in _OF_ONE:
        yield from _nodes(schema.get(key))


def _closed(schema: Any) -> Any:
    """The same, but objects that list properties have no others, unless something is said about others."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _OF_MANY:
        if isinstance(found.get(key), dict):
            found[key] = {name: _closed(each) for name, each in found[key].items()}
    for key in _OF_LIST:
        if isinstance(found.get(key), list):
            found[key] = [_closed(each) for each in found[key]]
    for key in _OF_ONE:
        if isinstance(found.get(key), dict):
            found[key] = _closed(found[key])
    return {**found, "additionalProperties": False} if _is_list_of_properties(found) else found


def _is_list_of_properties(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list):
        return False
    says_more = schema.keys() & {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"}
    return not says_more and all(isinstance(name, str) and name in properties for name in required)
