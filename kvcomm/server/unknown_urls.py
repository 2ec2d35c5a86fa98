"""Paths that lead nowhere: which operation was probably meant, and what base URL its clients want.

Clients append what they ask for to a base URL that somebody configured. So the end of a wrong path tells what was
wanted, whatever stands before it: no `/v1`, two of them, another service's prefix, or a whole endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastapi import APIRouter
from fastapi.routing import APIRoute

from kvcomm.server.errors import ApiError

VERSION = "v1"
MAX_SHOWN = 200
"""Letters of a path in a message."""

BASE_URLS = {
    "OpenAI": "The base URL of an OpenAI client ends in /v1 right behind host and port, as in http://HOST:PORT/v1",
    "Anthropic": "The base URL of an Anthropic client is host and port alone, as in http://HOST:PORT",
}
"""By the tag of an operation."""
ELSEWHERE = "the API is below /v1, its description at /openapi.json, a page for people at /ui"


class _Operation(NamedTuple):
    """`parts`: of its path, behind the version."""

    method: str
    prefix: str
    parts: tuple[str, ...]
    tags: tuple[str, ...]


class UnknownUrls:
    """What is told about a path that is none, by what the routers of an app have."""

    def __init__(self, routers: Sequence[APIRouter]) -> None:
        self._operations = [each for router in routers for each in _operations(router)]

    def __call__(self, method: str, path: str) -> ApiError:
        """The answer: 404, with a hint."""
        shown = path if len(path) <= MAX_SHOWN else f"{path[:MAX_SHOWN]}..."
        return ApiError(404, "unknown_url", f"there is nothing at {method} {shown}; {self.hint(method, path)}")

    def hint(self, method: str, path: str) -> str:
        """What to ask instead."""
        given = [part for part in path.split("/") if part]
        fitting = [each for each in self._operations if _fits(each.parts, given)]
        if not fitting:
            return ELSEWHERE
        best = max(fitting, key=lambda each: (_num_literal(each.parts), each.method == method))
        end = given[-len(best.parts) :]
        right = [theirs if _is_free(ours) else ours for ours, theirs in zip(best.parts, end, strict=True)]
        hint = f"did you mean {best.method} {best.prefix}/{'/'.join(right)}?"
        return " ".join([hint, *(BASE_URLS[tag] for tag in best.tags if tag in BASE_URLS)])


def _operations(router: APIRouter) -> Iterator[_Operation]:
    for route in router.routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        parts = [part for part in route.path.split("/") if part]
        prefix = f"/{parts.pop(0)}" if parts[0] == VERSION else ""
        tags = tuple(str(tag) for tag in route.tags)
        yield from (_Operation(method, prefix, tuple(parts), tags) for method in sorted(route.methods or ()))


def _fits(parts: Sequence[str], given: Sequence[str]) -> bool:
    """Whether a path ends like an operation's."""
    end = given[-len(parts) :]
    return len(end) == len(parts) and all(
        _is_free(ours) or ours == theirs.lower() for ours, theirs in zip(parts, end, strict=True)
    )


def _num_literal(parts: Sequence[str]) -> int:
    return sum(not _is_free(part) for part in parts)


def _is_free(part: str) -> bool:
    return part.startswith("{")
