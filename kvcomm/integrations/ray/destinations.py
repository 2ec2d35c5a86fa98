"""Where a request goes: to the replica of its context, to every replica, or to whoever holds most of it.

Pure functions of method, path and body; the paths are those of the server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

PATH_IDS = re.compile(r"/v1/(?:contexts|responses)/((?:ctx|resp)_[0-9a-f]{24})(?:/.*)?")
TENANT_PATH_IDS = re.compile(r"/admin/tenants/[^/]+/contexts/(ctx_[0-9a-f]{24})")
BODY_IDS = ("context_id", "previous_response_id")
SEGMENT_NAMES = re.compile(r"/v1/segments/[^/]+")


class Reach(StrEnum):
    """Who is asked."""

    ONE = "one"
    """Whoever holds most of the prompt, or the context."""
    EVERY = "every"
    """All replicas, as each keeps its own; one of their answers is the answer."""
    LISTED = "listed"
    """All replicas, whose lists together are the answer."""
    METRICS = "metrics"
    """All replicas, whose figures stand side by side under their names."""


class Destination(NamedTuple):
    """Where a request goes.

    Attributes:
        context_id: of the context or response whose replica is to answer.
        changes: that context, so that a second time is another change; what only comes to be from it does not.
    """

    reach: Reach
    context_id: str | None = None
    changes: bool = False


def destination_of(method: str, path: str, body: Mapping[str, Any]) -> Destination:
    """Where a request goes; `body` is empty where there is none, or it is no object."""
    if found := PATH_IDS.fullmatch(path) or TENANT_PATH_IDS.fullmatch(path):
        return Destination(Reach.ONE, found[1], changes=path.endswith("/extend"))
    if path == "/metrics":
        return Destination(Reach.METRICS)
    if method == "GET" and path == "/v1/contexts":
        return Destination(Reach.LISTED)
    if method in ("PUT", "DELETE") and (SEGMENT_NAMES.fullmatch(path) or path.startswith("/admin/")):
        return Destination(Reach.EVERY)
    named = next((value for name in BODY_IDS if isinstance(value := body.get(name), str)), None)
    return Destination(Reach.ONE, named, changes=bool(body.get("context_id")) and body.get("store") is True)
