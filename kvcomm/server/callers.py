"""Who may call by which name: the `Host` that a request is for, and the web page that it comes from.

A server without keys is only for this machine, so a name that some web page's owner made to point here (DNS rebinding)
is refused, and so is a page of any other origin: its browser would send the request, though not show it the answer. The
operator names exceptions: hosts (`allowed_hosts`) and origins (`cors_origins`). Programs that are no browsers send
neither `Origin` nor `Sec-Fetch-Site` and are not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Scope

from kvcomm.server.errors import ApiError
from kvcomm.server.hosts import ANY_ORIGIN, MAX_NAME, Authority, parse_authority, parse_origin

if TYPE_CHECKING:
    from kvcomm.server.settings import ServerSettings

OWN_SITES = frozenset({"same-origin", "none"})
"""What browsers say in `Sec-Fetch-Site` of a page of this very server, and of an address that somebody typed."""

EXPOSED = ("retry-after", "x-request-id")
"""Headers of answers that pages of other origins may read, besides those that they always may."""


def cors_of(settings: ServerSettings) -> dict[str, Any]:
    """For starlette's `CORSMiddleware`: allowed pages send any header, and nothing that browsers add themselves."""
    return {
        "allow_origins": settings.cors_origins,
        "allow_methods": ("GET", "POST", "PUT", "PATCH", "DELETE"),
        "allow_headers": ("*",),
        "allow_private_network": True,  # pages of public sites too: they are named, or bring a key
        "expose_headers": EXPOSED,
    }


def use_origin_form(scope: Scope) -> None:
    """Rewrite a request for a whole URL to one for its path: the URL's host is then what counts (RFC 9112, 3.2.2)."""
    target: bytes = scope.get("raw_path") or b"/"
    found = re.fullmatch(rb"(?i:https?)://([^/]*)(/.*)?", target, re.DOTALL)
    if found is None:
        return
    authority, path = found[1], found[2] or b"/"
    scope["raw_path"], scope["path"] = path, unquote(path.decode("ascii"))
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"host"] + [(b"host", authority)]


class Callers:
    """Which hosts and which pages' origins a server answers."""

    def __init__(self, *, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = (), has_keys: bool) -> None:
        """`allowed_hosts` with a port are allowed with that port only; both lists hold what the settings checked."""
        self._allowed = [known for text in allowed_hosts if (known := parse_authority(text)) is not None]
        self._origins = frozenset(cors_origins)
        self._has_keys = has_keys

    def require_host(self, headers: Headers) -> None:
        """Raises ApiError 400 for several hosts, 403 for one that is not this server's."""
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            raise ApiError(400, "invalid_host", f"a request is for one Host, not for {len(hosts)}")
        if self._has_keys and not self._allowed:
            return
        given = hosts[0] if hosts else ""
        host = parse_authority(given)
        if host is not None and (host.is_loopback or any(self._is(host, each) for each in self._allowed)):
            return
        why = "is not called so" if self._has_keys else "without keys is only for this machine, not for that Host"
        raise ApiError(
            403, "wrong_host", f"Host {given[:MAX_NAME]!r}: this server {why}; its operator can give --allowed-host"
        )

    def require_own_page(self, headers: Headers, *, is_operators: bool) -> None:
        """Refuse what a web page of another origin asks, unless the operator allowed that origin.

        Args:
            is_operators: the path is not for tenants. Without keys nobody's page may use those.

        Raises:
            ApiError: 403.
        """
        page = self._foreign_page(headers)
        if page is None:
            return
        if not (is_operators and not self._has_keys) and self._is_allowed(page):
            return
        what = "what is for the operator" if is_operators else "this server"
        message = f"a web page of {page[:MAX_NAME]!r} may not use {what}"
        raise ApiError(403, "cross_site", f"{message}; an origin can be allowed with --cors-origin")

    def _is_allowed(self, page: str) -> bool:
        origin = parse_origin(page)
        any_will_do = ANY_ORIGIN in self._origins and self._has_keys
        return origin is not None and (any_will_do or str(origin) in self._origins)

    def _foreign_page(self, headers: Headers) -> str | None:
        """The origin of another server's page that makes a request, or what is known of it; None: no such page."""
        site, given = (", ".join(headers.getlist(name)) for name in ("sec-fetch-site", "origin"))
        if site == "same-origin":  # says the browser itself, whatever proxies made of the Host
            return None
        if given:
            return None if self._is_own(given, headers) else given
        if site not in OWN_SITES | {""}:
            return site
        if not site and not self._has_keys:  # an old browser, which may at least say this much
            referer = ", ".join(headers.getlist("referer"))
            whole = re.match(r"[^:/]*://[^/?#]*", referer)
            if referer and not (whole is not None and self._is_own(whole[0], headers)):
                return whole[0] if whole is not None else referer
        return None

    def _is_own(self, given: str, headers: Headers) -> bool:
        origin, host = parse_origin(given), parse_authority(headers.get("host", ""))
        return origin is not None and host is not None and origin.is_served_as(host)

    def _is(self, host: Authority, allowed: Authority) -> bool:
        return host.host == allowed.host and allowed.port in (None, host.port)
