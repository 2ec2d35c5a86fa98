"""The OpenAPI document, true to what the server does: FastAPI's 422 goes, invalid requests are answered with 400."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kvcomm import __version__

UNUSED = ("HTTPValidationError", "ValidationError")
DESCRIPTION = "OpenAI's API over a shared KV cache: exact prefix reuse for every tenant, and a word on every miss."


def install(app: FastAPI) -> None:
    """Let the app give this document at /openapi.json."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title="kvcomm", version=__version__, description=DESCRIPTION, routes=app.routes)
            app.openapi_schema = _without_422(schema)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _without_422(schema: dict[str, Any]) -> dict[str, Any]:
    for operations in schema["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("422", {}).get("content", {})
            reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
            if reference.endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
    for name in UNUSED:
        schema["components"]["schemas"].pop(name, None)
    return schema
