"""The store at a URL. What a kind of store needs is imported when one is opened."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from kvcomm.errors import TierError
from kvcomm.tiers.folder import FolderStore
from kvcomm.tiers.store import ObjectStore, shown_url
from kvcomm.values import text

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

BUCKETS = ("s3", "gs", "az")
REDIS = ("redis", "rediss", "unix")


def open_store(url: str, *, is_made: bool = True) -> ObjectStore:
    """The store at a URL.

    Args:
        url: a folder as a path or `file://` URL, `s3://bucket/prefix`, `gs://...`, `az://...` or `redis://host/0`.
        is_made: a folder that is not there is made, for its owner alone, if its parent is.

    Raises:
        TierError: no such kind of store, or it cannot be opened; says why in one line.
        MissingExtra: the package that it needs is not installed.
    """
    if not text("a tier's URL", url).strip() or "\0" in url:
        raise TierError(f"a tier is named by a folder or a URL, not by {url!r}")
    if not _SCHEME.match(url):
        return FolderStore.open(Path(url).expanduser(), is_made=is_made)
    scheme = url.partition("://")[0].lower()
    if scheme == "file":
        return FolderStore.open(_local_path(url), is_made=is_made)
    if scheme in BUCKETS:
        from kvcomm.tiers.objects import open_bucket

        return open_bucket(url)
    if scheme in REDIS:
        from kvcomm.tiers.redis_store import open_redis

        return open_redis(url)
    known = ", ".join(f"{each}://" for each in ("file", *BUCKETS, *REDIS))
    raise TierError(f"{shown_url(url)} is no tier: {scheme}:// is not known; a path or one of {known} is")


def _local_path(url: str) -> Path:
    from urllib.request import url2pathname  # behind which all of http comes

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise TierError(f"{url} names a folder of the host {parts.netloc}; write file:///path for one of this machine")
    if not parts.path or parts.query or parts.fragment:
        raise TierError(f"{url} names no folder; write file:///path, with %3F for ? and %23 for #")
    return Path(url2pathname(parts.path))
