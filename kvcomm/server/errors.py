"""What clients are told when something goes wrong: OpenAI's error shape, a status, never a word about other tenants.

`ApiError` is the one error that handlers raise; kvcomm's own errors and pydantic's are translated here, in one place.
Messages that count the engine's pages or requests are replaced: those numbers belong to all tenants together.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from kvcomm.errors import (
    ContextReleased,
    EmptyPrompt,
    EngineClosed,
    InvalidRequest,
    PoolExhausted,
    PoolTooSmall,
    PromptTooLong,
    QuotaExceeded,
    RequestCancelled,
    SourceFailed,
    UnknownAdapter,
    WeightsChanged,
)
from kvcomm.server.schemas.anthropic_answers import MessagesErrorCode, MessagesErrorDetail, MessagesErrorResponse
from kvcomm.server.schemas.common import REQUEST_KINDS
from kvcomm.server.schemas.errors import ErrorDetail, ErrorResponse

logger = logging.getLogger("kvcomm.server")

SOURCE_FAILED = "source_failed"
"""Code of the error where an answer that a request follows comes to nothing."""

RETRY_AFTER = "retry-after"
CLOSE = {"connection": "close"}
CLIENT_GONE = 499
"""Logged where nobody is left to be answered; never sent."""

BODY_KINDS = frozenset({"missing", "model_type", "model_attributes_type"})
"""Errors about a body that is none, or no object."""

MAX_SHOWN = 60  # characters of a bad value in a message
MAX_MESSAGE, MAX_PARAM = 1000, 200  # characters of an error

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
MESSAGES_PATH = "/v1/messages"
MESSAGES_TYPES = {
    **TYPES,
    409: "invalid_request_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
"""Where Anthropic's API is: its errors have another shape, and other names."""

MEANINGS = {
    400: "The request is not valid; `param` names the field.",
    401: "No API key, or one that is not known.",
    403: "The API key is of another kind.",
    404: "There is no such model or resource.",
    408: "The body did not arrive in time.",
    409: "What the request is about is in another state than the request needs.",
    413: "The body is too large.",
    422: "A boundary between texts would split a token; the message names it.",
    429: "A limit of the tenant is reached; `Retry-After` says when to come back.",
    500: "The request failed inside the server.",
    503: "The server is full, or about to stop; `Retry-After` says when to come back.",
    504: "The answer took too long.",
}


class ApiError(HTTPException):
    """An answer that is not a success.

    Attributes:
        code: for programs, such as "model_not_found".
        param: the field at fault.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        extra = {} if retry_after_s is None else {RETRY_AFTER: str(max(1, math.ceil(retry_after_s)))}
        super().__init__(status, _shortened(message, MAX_MESSAGE), {**(headers or {}), **extra})
        self.code = code
        self.param = None if param is None else _shortened(param, MAX_PARAM)

    @property
    def body(self) -> dict[str, Any]:
        """The answer as JSON values."""
        kind = TYPES.get(self.status_code, "server_error")
        detail = ErrorDetail(message=self.detail, type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The answer, in the shape of the API that was asked."""
        return ErrorAnswer(self)


class ErrorAnswer(JSONResponse):
    """An error; which API its request was for is known once it is sent."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body, error.status_code, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path != MESSAGES_PATH and not path.startswith(f"{MESSAGES_PATH}/"):
            await super().__call__(scope, receive, send)
            return
        body = messages_error(self._error, request_id=scope["state"]["notes"].request_id)
        await JSONResponse(body, self.status_code, headers=self._error.headers)(scope, receive, send)


def messages_error(error: ApiError, *, request_id: str) -> dict[str, Any]:
    """An error as Anthropic's API tells it, with its code and parameter beside."""
    kind = MESSAGES_TYPES.get(error.status_code, "api_error")
    detail = MessagesErrorDetail(
        type=kind,
        message=error.detail,
        details=MessagesErrorCode(error_code=error.code),
        param=error.param,
        code=error.code,
    )
    return MessagesErrorResponse(error=detail, request_id=request_id).model_dump()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Statuses of an operation for its OpenAPI document, all with an error body."""
    return {status: {"model": ErrorResponse, "description": MEANINGS[status]} for status in statuses}


COMPUTING = documented(400, 401, 403, 404, 408, 409, 413, 429, 500, 503, 504)
"""Errors of operations that compute something for a prompt."""

COMPUTING_TEXTS = {**COMPUTING, **documented(422)}
"""The same, for a prompt that may be given as texts of their own."""


def translate(error: BaseException, *, retry_after_s: float = 1, context_tokens: int = 0) -> ApiError:
    """What a client is told about an error of the engine; nothing about one that nobody expected: log that.

    Args:
        context_tokens: what the client's own contexts hold.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return ApiError(400, "context_length_exceeded", str(error))
    if isinstance(error, EmptyPrompt):
        return ApiError(400, "empty_prompt", "the prompt has no tokens")
    if isinstance(error, UnknownAdapter):  # gone between the door and the engine
        return ApiError(404, "model_not_found", str(error), param="model")
    if isinstance(error, SourceFailed):
        message = "the answer that this request follows failed, was cancelled, or took too long; ask for it again"
        return ApiError(409, SOURCE_FAILED, message, param="segments")
    if isinstance(error, WeightsChanged):
        message = "the model's weights are others now than when this began; send the request, or make the context, anew"
        return ApiError(409, "weights_changed", message)
    if isinstance(error, InvalidRequest):
        return ApiError(400, "invalid_value", str(error))
    if isinstance(error, PoolTooSmall):
        return ApiError(400, "request_too_large", str(error), param="max_tokens")
    if isinstance(error, QuotaExceeded):
        message = "this tenant's quota is used up by its own contexts and requests; release some, or wait"
        return ApiError(429, "quota_exceeded", message, retry_after_s=retry_after_s)
    if isinstance(error, PoolExhausted):
        own = f"this tenant's contexts hold {context_tokens} tokens: delete some, or " if context_tokens else ""
        message = f"there is no room for this request's KV right now; {own}try again later"
        return ApiError(503, "pool_exhausted", message, retry_after_s=retry_after_s)
    if isinstance(error, RequestCancelled | ContextReleased):
        return ApiError(409, "context_deleted", "the context of this request was deleted meanwhile")
    if isinstance(error, EngineClosed):
        return ApiError(503, "engine_closed", "the server is stopping", retry_after_s=retry_after_s)
    return ApiError(500, "internal_error", "the request failed inside the server; its log says why")


def failed_file(code: str, what: str, error: BaseException, *, retry_after_s: float = 1) -> ApiError:
    """The answer where the disk fails: 503 with the system's own reason; where that was is for the operator's log.

    Args:
        error: of the system, or one of ours that it caused.
    """
    system = error if isinstance(error, OSError) else error.__cause__
    told = str(error) or type(error).__name__
    logger.error("%s: %s", what, told, extra={"fields": {"error": type(error).__name__, "code": code}})
    reason = system.strerror if isinstance(system, OSError) and system.strerror else _system_words(told)
    return ApiError(503, code, f"{what} cannot be read or written now: {reason}", retry_after_s=retry_after_s)


def _system_words(told: str) -> str:
    """What safetensors says of a failed write carries the system's number only."""
    number = re.search(r"os error (\d+)", told)
    return os.strerror(int(number[1])) if number else "the server's log says why"


def install(app: FastAPI, *, unknown_url: Callable[[str, str], ApiError]) -> None:
    """Answer every error of the app in OpenAI's shape.

    Args:
        unknown_url: the answer to a method and a path that lead nowhere.
    """

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 404 and not isinstance(error, ApiError):
            error = unknown_url(request.method, request.url.path)
        return await _on_http(request, error)

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return _answer(request, error)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    code = phrase.replace(" ", "_")
    return _answer(request, ApiError(error.status_code, code, error.detail or phrase, headers=error.headers))


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(request, invalid(error.errors(), error.body))


def _answer(request: Request, error: ApiError) -> JSONResponse:
    request.state.notes.error = error
    return error.response()


def invalid(errors: Sequence[Any], body: object) -> ApiError:
    """The first thing wrong with a request, by name."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {first['ctx']['error']}")
    where, *path = first["loc"]
    param = _param(path, body) if where == "body" else ".".join(str(part) for part in path)
    kind, message = first["type"], _lower(first["msg"])
    if not param and kind in BODY_KINDS:
        return ApiError(400, "invalid_body", "the body must be a JSON object, with 'Content-Type: application/json'")
    if kind == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"unknown parameter: {param!r}", param=param)
    if kind == "missing":
        return ApiError(400, "missing_required_parameter", f"missing required parameter: {param!r}", param=param)
    if kind == "unsupported":
        return ApiError(400, "unsupported_value", f"{param} {first['msg']}", param=param)
    if not param:
        return ApiError(400, "invalid_value", first["msg"], param=first.get("ctx", {}).get("param"))
    if (shown := _shown(first["input"])) is not None:
        message += f", not {shown}"
    return ApiError(400, "invalid_value", f"{param}: {message}", param=param)


def _param(path: Sequence[Any], body: object) -> str:
    """A path such as messages[0].content; branches of unions, which no client sent, are left out."""
    text, at = "", body
    if path and path[0] in REQUEST_KINDS:
        path = path[1:]
    for index, part in enumerate(path):
        if part == "[key]":  # of a dictionary, which is the part before
            break
        if isinstance(at, list) and isinstance(part, int):
            text += f"[{part}]"
            at = at[part] if part < len(at) else None
        elif isinstance(at, dict) and (part in at or index == len(path) - 1):
            text += f".{part}" if text else str(part)
            at = at.get(part)
    return text


def _shown(value: object) -> str | None:
    """A bad value for a message; None: it says more than a message should."""
    if isinstance(value, str | bytes) and len(value) > MAX_SHOWN:
        return None
    shown = repr(value) if value is None or isinstance(value, str | bytes | int | float) else None
    return shown if shown is not None and len(shown) <= MAX_SHOWN else None


def _shortened(text: str, most: int) -> str:
    """What clients sent comes back in messages, and not at any length."""
    return text if len(text) <= most else f"{text[:most]}..."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
