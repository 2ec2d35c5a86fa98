"""Bytes by name, in whatever keeps them: the one interface that a tier needs.

A store knows nothing of KV. An object is written once and never changed, so that it is there whole or not at all, and
whoever reads it may go on reading while others delete it. Names are relative paths of letters, digits and `._=-`; what
is not made of these is refused here, before any store sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from kvcomm.errors import TierError

MAX_KEY = 512
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9][A-Za-z0-9._=-]*)*")


class StoredObject(NamedTuple):
    """What a listing says of an object.

    Attributes:
        num_bytes: that it takes.
        modified_s: when it was written, on the store's clock, in seconds since 1970.
        used_s: when it was last asked for, where the store keeps that; else when it was written.
    """

    key: str
    num_bytes: int
    modified_s: float
    used_s: float


class ObjectStore(Protocol):
    """Objects by name. Safe to use from several threads.

    Attributes:
        kind: "folder", "s3", "gs", "az" or "redis": its label in metrics.
        url: how it was opened, without anything secret.
    """

    kind: str
    url: str

    def get(self, key: str) -> memoryview:
        """A whole object, in memory that is the caller's own.

        Raises:
            ObjectMissing: there is none.
            StoreFailed: it cannot be read.
        """

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """At most `length` bytes of an object from `start` on; fewer where it ends.

        Raises:
            ObjectMissing: there is none.
            StoreFailed: it cannot be read.
        """

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        """Write an object made of parts in their order; False: there is one already, which stays as it is.

        Raises:
            StoreFailed: it cannot be written; nothing is there under that name.
        """

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The objects whose names begin with a prefix that ends where a part of a name does; in no order.

        Raises:
            StoreFailed: they cannot be listed.
        """

    def delete(self, key: str) -> None:
        """Remove an object, if it is there.

        Raises:
            StoreFailed: it cannot be removed.
        """

    def sweep(self) -> int:
        """Remove what killed writers left, never what living ones write; returns how much there was.

        Raises:
            StoreFailed: it cannot be looked for.
        """

    def close(self) -> None:
        """Give up connections; the store is not used afterwards."""


def safe_key(key: str) -> str:
    """The name itself.

    Raises:
        TierError: it is no name of an object.
    """
    if not is_safe(key):
        raise TierError(f"{key[:80]!r} is no name of an object: parts of A-Z a-z 0-9 . _ = - joined by / are")
    return key


def is_safe(key: str) -> bool:
    """Whether it is a name of an object."""
    return len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def safe_prefix(prefix: str) -> str:
    """A prefix without its last slash.

    Raises:
        TierError: it is none of names.
    """
    return safe_key(prefix.removesuffix("/")) if prefix else ""


def shown_url(url: str) -> str:
    """A URL without user, password and query, for messages."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{host}{port}{parts.path}"
