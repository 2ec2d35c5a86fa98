"""The structured log: one JSON object a line, and one line per request; no prompt or answer unless that is asked for.

The middleware here is the outermost one. It gives every request an id (the client's own `x-request-id` if that is a
plain one), puts it on every response, times and counts the request, and turns an error that nobody expected into a 500
that says nothing about it; the log has the traceback under the same id.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm.engine.results import Usage
from kvcomm.server.errors import CLIENT_GONE, ApiError, translate

logger = logging.getLogger("kvcomm.server")

REQUEST_ID = "x-request-id"
MAX_PATH = 512
"""Letters of a path in a log line; every real one has fewer."""

PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Answered(NamedTuple):
    """An engine request that came to its end; `submitted_ns` since the epoch."""

    submitted_ns: int
    usage: Usage


@dataclass(eq=False)
class RequestNotes:
    """What the log, and a trace, will say about a request.

    Attributes:
        request_id: unique unless the client repeats its own.
        fields: more for the log line; JSON values.
        route: path template of the operation, for metrics; "other" for what is none.
        answered: its engine requests.
        finish_reasons: of its answers, as its client is told them; by engine request and choice.
        error: that it was answered with, be it as the last event of a stream.
        stopped: code of what stopped a stream that nobody reads any more.
    """

    request_id: str
    tenant: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    route: str = "other"
    answered: list[Answered] = field(default_factory=list)
    finish_reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    error: ApiError | None = None
    stopped: str | None = None

    def tokens(self) -> dict[str, Any]:
        """The tokens of its engine requests, for the log line; nothing where none was answered."""
        if not self.answered:
            return {}
        usages = [usage for _, usage in self.answered]
        return {
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "cached_tokens": sum(usage.exact_tokens for usage in usages),
            "aligned_tokens": sum(usage.aligned_tokens for usage in usages),
            "completion_tokens": sum(usage.generated_tokens for usage in usages),
            "ttft_s": max(usage.ttft_s for usage in usages),
        }


def notes_of(scope: Scope) -> RequestNotes:
    """The notes of a request that came through `RequestLog`."""
    notes = scope["state"]["notes"]
    assert isinstance(notes, RequestNotes)
    return notes


def log_unexpected(error: BaseException, notes: RequestNotes) -> None:
    """Keep the traceback of an error whose client is told nothing but a request id."""
    notes.fields["error"] = type(error).__name__
    logger.error("unexpected error", exc_info=error, extra={"fields": {"request_id": notes.request_id}})


class Ended(NamedTuple):
    """A request at its end; the method and path are whatever the client sent."""

    method: str
    path: str
    status: int
    duration_s: float
    notes: RequestNotes


Observe = Callable[[Ended], None]
"""Called at the end of every request."""


class RequestLog:
    """ASGI middleware: ids, one log line and one observation per request, and the last resort for errors."""

    def __init__(self, app: ASGIApp, *, observe: Observe) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        notes = RequestNotes(given if PLAIN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}")
        scope.setdefault("state", {})["notes"] = notes
        began_s, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = notes.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the last one who could tell the client
            log_unexpected(error, notes)
            if not status:
                notes.error = translate(error)
                await notes.error.response()(scope, receive, send_with_id)
        finally:
            if route := scope.get("route"):
                notes.route = route.path
            status = status or CLIENT_GONE
            self._log(Ended(scope["method"], scope["path"], status, time.monotonic() - began_s, notes))

    def _log(self, ended: Ended) -> None:
        self._observe(ended)
        notes = ended.notes
        fields = {
            "request_id": notes.request_id,
            "tenant": notes.tenant,
            "method": ended.method,
            "path": ended.path[:MAX_PATH],
            "status": ended.status,
            "duration_s": round(ended.duration_s, 6),
            **notes.tokens(),
            **({"finish_reasons": list(notes.finish_reasons.values())} if notes.finish_reasons else {}),
            **({"refusal": notes.error.code} if notes.error is not None else {}),
            **({"stopped": notes.stopped} if notes.stopped is not None else {}),
            **notes.fields,
        }
        logger.info("request", extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and what the record's `fields` add."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def logging_config(level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: everything as JSON on stderr, uvicorn's own access log off."""
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
    shown = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": handler},
        "loggers": {
            "kvcomm": shown,
            "opentelemetry": {**shown, "level": "WARNING"},
            "uvicorn": {**shown, "level": "WARNING" if level == "info" else level.upper()},
            "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
        },
    }
