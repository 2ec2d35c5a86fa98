"""Named segments of one tenant, with their versions.

A version never changes; putting another text under a name makes the next one. Bounded by the text's bytes over all
names and versions, because texts are kept whether or not their KV is cached. Lookups may come from worker threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.segments import Kind

MAX_VERSIONS = 16
"""Of one name; the oldest goes first."""


@dataclass(frozen=True)
class NamedText:
    """A version of a named segment.

    Attributes:
        digest: of the token ids in the tenant's namespace.
        ttl: as the client wrote it.
        created: seconds since 1970.
    """

    name: str
    version: int
    text: str
    token_ids: tuple[int, ...]
    digest: str
    kind: Kind
    ttl: str | None
    created: int

    @property
    def num_bytes(self) -> int:
        """Of its text."""
        return len(self.text.encode())


class SegmentRegistry:
    """Versions by name, the latest last."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._names: dict[str, tuple[NamedText, ...]] = {}
        self._lock = threading.Lock()

    def put(self, text: NamedText) -> NamedText:
        """Keep a text as the next version of its name, whatever version it says; the latest one if it is the same.

        Raises:
            ApiError: 429 when the tenant's texts would exceed their limit.
        """
        with self._lock:
            versions = self._names.get(text.name, ())
            last = versions[-1] if versions else None
            if last is not None and (last.text, last.kind, last.ttl) == (text.text, text.kind, text.ttl):
                return last
            kept = (*versions[-MAX_VERSIONS + 1 :], replace(text, version=1 if last is None else last.version + 1))
            held = sum(each.num_bytes for name, own in self._names.items() if name != text.name for each in own)
            needed = held + sum(each.num_bytes for each in kept)
            if needed > self._max_bytes:
                message = (
                    f"named segments may hold {self._max_bytes} bytes of text, all versions together, and these would "
                    f"be {needed}; delete some"
                )
                raise ApiError(429, "too_many_segments", message, param="content")
            self._names[text.name] = kept
            return kept[-1]

    def get(self, name: str, version: int | None = None) -> NamedText:
        """A version, by default the latest.

        Raises:
            ApiError: 404 for an unknown name, or version of it.
        """
        versions = self.versions(name)
        found = [each for each in versions if version in (None, each.version)]
        if not found:
            known = f"{versions[0].version} to {versions[-1].version}"
            message = f"segment {name!r} has no version {version}; there are {known}"
            raise ApiError(404, "segment_not_found", message, param="version")
        return found[-1]

    def versions(self, name: str) -> tuple[NamedText, ...]:
        """All versions that are kept, the latest last; raises ApiError 404 for an unknown name."""
        with self._lock:
            versions = self._names.get(name)
        if versions is None:
            raise _unknown(name)
        return versions

    def remove(self, name: str) -> int:
        """Forget a name; returns how many versions it had. Raises ApiError 404 for an unknown name."""
        with self._lock:
            removed = self._names.pop(name, None)
        if removed is None:
            raise _unknown(name)
        return len(removed)

    @property
    def latest(self) -> list[NamedText]:
        """The latest version of every name, by name."""
        with self._lock:
            return [versions[-1] for _, versions in sorted(self._names.items())]


def _unknown(name: str) -> ApiError:
    message = f"there is no segment {name!r}; GET /v1/segments lists those there are"
    return ApiError(404, "segment_not_found", message, param="name")


class SegmentRegistries:
    """The registry of every tenant that has used one."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of texts, per tenant."""
        self._max_bytes = max_bytes
        self._registries: dict[str, SegmentRegistry] = {}

    def of(self, tenant: str) -> SegmentRegistry:
        """The registry of the tenant with that name."""
        return self._registries.setdefault(tenant, SegmentRegistry(self._max_bytes))
