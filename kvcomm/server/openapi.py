"""The OpenAPI document, true to what the server does.

FastAPI's 422 goes, since invalid requests are answered with 400, and what only the running server knows comes in: the
models that requests may name, and which token ids they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kvcomm import __version__
from kvcomm.server.schemas.common import MODEL_NAME, TOKEN_ID, TOKEN_NAMES

UNUSED = ("HTTPValidationError", "ValidationError")
DESCRIPTION = "OpenAI's API over a shared KV cache: exact prefix reuse for every tenant, and a word on every miss."


def install(app: FastAPI, *, models: Callable[[], Sequence[str]], vocab_size: int) -> None:
    """Let the app give this document at /openapi.json."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title="kvcomm", version=__version__, description=DESCRIPTION, routes=app.routes)
            _drop_422(schema)
            for definition in _definitions(schema):
                if definition.get("format") == TOKEN_ID:
                    definition["maximum"] = vocab_size - 1
                elif definition.get("format") == TOKEN_NAMES:
                    definition["propertyNames"] = {"pattern": numbers_below(vocab_size)}
                elif definition.get("format") == MODEL_NAME:
                    definition["enum"] = list(models())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def numbers_below(limit: int) -> str:
    """A regular expression for the numbers in [0, limit) as they are written; `limit` is at least 1."""
    last = str(limit - 1)
    forms = ["0", *("[1-9]" + "[0-9]" * num for num in range(len(last) - 1))]
    for at, digit in enumerate(last):
        first = 0 if at else 1
        if int(digit) > first:
            forms.append(f"{last[:at]}[{first}-{int(digit) - 1}]" + "[0-9]" * (len(last) - at - 1))
    return f"^({'|'.join(dict.fromkeys([*forms, last]))})$"


def _drop_422(schema: dict[str, Any]) -> None:
    for operations in schema["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("422", {}).get("content", {})
            reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
            if reference.endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
    for name in UNUSED:
        schema["components"]["schemas"].pop(name, None)


def _definitions(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _definitions(item)
