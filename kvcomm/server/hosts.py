"""Hosts and origins as texts: read strictly, as RFC 3986, RFC 6454 and RFC 9110 write them, and made comparable.

Whatever is not exactly a host with a port, or exactly an origin, is None: what stands behind a bracket, a second colon,
user names, spaces, zones, and numbers that only some programs take for addresses. Knows nothing about requests.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

MAX_PORT = 65_535
DEFAULT_PORTS = {"http": 80, "https": 443}
ANY_ORIGIN = "*"

LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"({LABEL}(?:\.{LABEL})*)\.?")
MAX_NAME = 253
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label like this makes a name an IPv4 address for browsers, however odd."""
HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)")


class Authority(NamedTuple):
    """A host in the one spelling in which it is compared, and its port, if one was given."""

    host: str
    port: int | None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be meant; every name but localhost counts as public."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


class Origin(NamedTuple):
    """Where a web page comes from."""

    scheme: str
    authority: Authority

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    def is_served_as(self, host: Authority) -> bool:
        """Whether it is what a server called `host` serves, over http or https."""
        default = DEFAULT_PORTS.get(self.scheme)
        own, given = (each.port or default for each in (self.authority, host))
        return default is not None and self.authority.host == host.host and own == given


def parse_authority(text: str) -> Authority | None:
    """A host, with or without a port from 1 to 65535; None: the text is nothing of the kind."""
    found = HOST_AND_PORT.fullmatch(text)
    if found is None or not text.isascii():
        return None
    host = _parse_host(found[1].lower())
    port = None if found[2] is None else int(found[2])
    if host is None or (port is not None and not 1 <= port <= MAX_PORT):
        return None
    return Authority(host, port)


def parse_origin(text: str) -> Origin | None:
    """An origin as browsers write it, a scheme's usual port left out; None: the text is none, such as "null"."""
    found = ORIGIN.fullmatch(text.lower())
    authority = None if found is None else parse_authority(found[2])
    if found is None or authority is None:
        return None
    if authority.port == DEFAULT_PORTS.get(found[1]):
        authority = authority._replace(port=None)
    return Origin(found[1], authority)


def _parse_host(text: str) -> str | None:
    if text.startswith("["):
        return _parse_ipv6(text[1:-1])
    found = NAME.fullmatch(text)
    if found is None or len(found[1]) > MAX_NAME:
        return None
    name = found[1]
    if not NUMBER.fullmatch(name.rpartition(".")[2]):
        return name
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        return None


def _parse_ipv6(text: str) -> str | None:
    """An address without a zone, which means nothing to anybody else; one that stands for an IPv4 address is that."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    if address.scope_id is not None:
        return None
    return str(address.ipv4_mapped or address)
