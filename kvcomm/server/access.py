"""The door: which key opens which path, and who is let in now; decided before a body is read.

Paths that tell nothing about tenants are open. `/admin` needs an admin's key, `/metrics` an admin's or a reader's (the
counters there are those of all tenants together), everything else a tenant's. Without a key file every caller is the
one default tenant, and the operator too: `kvcomm serve` then only listens on this machine, and only callers that mean
this machine are let in, or any web page could use a name that points here (DNS rebinding).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcomm.server.callers import Callers, use_origin_form
from kvcomm.server.errors import ApiError
from kvcomm.server.keys import KeyRecord, KeyRing, Role
from kvcomm.server.logs import notes_of
from kvcomm.tiers.space import DEFAULT_TENANT

if TYPE_CHECKING:
    from kvcomm.server.admission import AdmissionControl
    from kvcomm.server.tenants import Tenant

OPEN = frozenset({"/", "/health", "/ready", "/version", "/openapi.json", "/ui"})
UNMETERED = frozenset({"/v1/stats"})
"""Paths of tenants that count towards no rate: a dashboard left open must not use up what requests need."""
BEARER, KEY_HEADER = "bearer ", "x-api-key"
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

COMPUTING = re.compile(
    r"/v1/(chat/completions|completions|responses|messages|contexts|contexts/[^/]+/extend|snapshots/[^/]+/restore|cache/warm)"
)
"""Paths whose POST asks for engine requests; a fork or a new name does not."""

security = HTTPBearer(auto_error=False, description="An API key made by `kvcomm serve keys add`.")
"""Documents the scheme on operations that need a key; the check itself is made at the door."""
key_header = APIKeyHeader(
    name=KEY_HEADER, auto_error=False, description="The same key, as Anthropic's clients send it."
)
"""The other scheme, understood on every path."""


def roles_for(path: str) -> frozenset[Role]:
    """Roles that open a path; empty: everybody."""
    if path in OPEN:
        return frozenset()
    if path == "/admin" or path.startswith("/admin/"):
        return frozenset({Role.ADMIN})
    if path == "/metrics":
        return frozenset({Role.ADMIN, Role.METRICS})
    return frozenset({Role.TENANT})


def tenant_name(scope: Scope) -> str:
    """The name of the tenant whose key a request carries."""
    name = scope["state"]["tenant"]
    assert isinstance(name, str), f"{scope['path']} is served to no tenant"
    return name


class Door:
    """ASGI middleware: finds the tenant and lets it in, or answers 401, 403, 429 or 503."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        callers: Callers,
        tenant: Callable[[str], Tenant],
        admission: AdmissionControl,
    ) -> None:
        """`tenant` gives a tenant by name."""
        self._app = app
        self._keys = keys
        self._callers = callers
        self._tenant = tenant
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        use_origin_form(scope)
        with ExitStack() as stack:
            try:
                self._identify_caller(scope)
                if scope["method"] in WITH_BODY and Role.TENANT in roles_for(scope["path"]):
                    computes = scope["method"] == "POST" and COMPUTING.fullmatch(scope["path"]) is not None
                    tenant = self._tenant(tenant_name(scope))
                    stack.enter_context(self._admission.letting_in(tenant, computes=computes))
            except ApiError as error:
                notes_of(scope).error = error
                await error.response()(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _identify_caller(self, scope: Scope) -> None:
        roles = roles_for(scope["path"])
        if not roles:
            return
        name = identify(scope, self._keys, self._callers)
        scope["state"]["tenant"] = name
        if name is not None:
            notes_of(scope).tenant = name
            if Role.TENANT in roles and scope["path"] not in UNMETERED:
                self._tenant(name).require_rate()


def identify(scope: Scope, keys: KeyRing | None, callers: Callers) -> str | None:
    """The tenant of whoever may ask for a path; None: it is open to all, or for the operator.

    Args:
        keys: None: everybody is the one default tenant, the operator too.

    Raises:
        ApiError: 400 or 403 for a host or a web page that may not, 401 or 403 for a key that does not open the path.
    """
    roles = roles_for(scope["path"])
    if not roles:
        return None
    headers = Headers(scope=scope)
    callers.require_host(headers)
    callers.require_own_page(headers, is_operators=Role.TENANT not in roles)
    return DEFAULT_TENANT if keys is None else _key_of(keys, scope, headers, roles).tenant


def _key_of(keys: KeyRing, scope: Scope, headers: Headers, roles: frozenset[Role]) -> KeyRecord:
    given = headers.get("authorization", "")
    if given.lower().startswith(BEARER):
        key = given[len(BEARER) :].strip()
    elif not (key := headers.get(KEY_HEADER, "").strip()):
        message = f"no API key: send the header 'Authorization: Bearer KEY', or '{KEY_HEADER}: KEY'"
        raise _unauthorized("missing_api_key", message)
    record = keys.find(key)
    if record is None:
        raise _unauthorized("invalid_api_key", "this API key is not known")
    if record.role not in roles:
        wanted = " or ".join(sorted(role.value for role in roles))
        message = f"{scope['path']} needs the key of a role {wanted}, and this one is of the role {record.role.value}"
        raise ApiError(403, "wrong_key", message)
    return record


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers={"www-authenticate": "Bearer"})
