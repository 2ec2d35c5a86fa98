"""Named segments of one tenant, with their versions.

A version never changes; putting another text under a name makes the next one. Bounded by the text's bytes over all
names and versions, because texts are kept whether or not their KV is cached, and by the number of names, because the
shortest text has a record too. Lookups may come from worker threads.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.segments import PromptSegment, RegisteredSegment, SegmentKind

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
    token_ids: Sequence[int]
    digest: str
    kind: SegmentKind
    ttl: str | None
    created: int

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its text."""
        return len(self.text.encode())


class SegmentRegistry:
    """Versions by name, the latest last."""

    def __init__(self, max_bytes: int, max_names: int = 1024) -> None:
        self._max_bytes = max_bytes
        self._max_names = max_names
        self._names: dict[str, tuple[NamedText, ...]] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def put(self, text: NamedText) -> NamedText:
        """Keep a text as the next version of its name, whatever version it says; the latest one if it is the same.

        Raises:
            ApiError: 429 when the tenant's texts, or names, would exceed their limit.
        """
        with self._lock:
            versions = self._names.get(text.name, ())
            last = versions[-1] if versions else None
            if last is not None and (last.text, last.kind, last.ttl) == (text.text, text.kind, text.ttl):
                return last
            if last is None and len(self._names) >= self._max_names:
                message = f"this tenant has {len(self._names)} of at most {self._max_names} named segments; delete some"
                raise ApiError(429, "too_many_segments", message, param="name")
            # Numbers of an array take four bytes each, those of a tuple nine times as many.
            new = replace(text, version=1 if last is None else last.version + 1, token_ids=array("I", text.token_ids))
            kept = (*versions[-MAX_VERSIONS + 1 :], new)
            needed = self._num_bytes - sum(each.num_bytes for each in versions) + sum(each.num_bytes for each in kept)
            if needed > self._max_bytes:
                message = (
                    f"named segments may hold {self._max_bytes} bytes of text, all versions together, and these would "
                    f"be {needed}; delete some"
                )
                raise ApiError(429, "too_many_segments", message, param="content")
            self._names[text.name], self._num_bytes = kept, needed
            return new

    def bring_back(self, versions: Sequence[NamedText]) -> bool:
        """Take in a name as another server had it; False: it is known here, or there is no room for it."""
        with self._lock:
            name, num_bytes = versions[0].name, self._num_bytes + sum(each.num_bytes for each in versions)
            if name in self._names or len(self._names) >= self._max_names or num_bytes > self._max_bytes:
                return False
            self._names[name] = tuple(replace(each, token_ids=array("I", each.token_ids)) for each in versions)
            self._num_bytes = num_bytes
            return True

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

    def num_bytes_of(self, name: str) -> int:
        """Bytes of the longest version of a name; 0 for an unknown one."""
        with self._lock:
            return max((each.num_bytes for each in self._names.get(name, ())), default=0)

    def remove(self, name: str) -> int:
        """Forget a name; returns how many versions it had. Raises ApiError 404 for an unknown name."""
        with self._lock:
            removed = self._names.pop(name, None)
            if removed is None:
                raise _unknown(name)
            self._num_bytes -= sum(each.num_bytes for each in removed)
        return len(removed)

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts."""
        with self._lock:
            return self._num_bytes

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

    def __init__(self, max_bytes: int, max_names: int = 1024) -> None:
        """`max_bytes`: of texts, and `max_names`, both per tenant."""
        self._max_bytes = max_bytes
        self._max_names = max_names
        self._registries: dict[str, SegmentRegistry] = {}

    def num_bytes(self, tenant: str, inputs: Iterable[PromptSegment]) -> int:
        """Bytes of the texts that a request's segments name."""
        named = (each for each in inputs if isinstance(each, RegisteredSegment))
        return sum(self.of(tenant).num_bytes_of(each.name) for each in named)

    def of(self, tenant: str) -> SegmentRegistry:
        """The registry of the tenant with that name."""
        return self._registries.setdefault(tenant, SegmentRegistry(self._max_bytes, self._max_names))

    def find(self, tenant: str) -> SegmentRegistry | None:
        """The same, if it has used one."""
        return self._registries.get(tenant)

    def remove(self, tenant: str) -> int:
        """Forget all names of a tenant; returns how many there were."""
        registry = self._registries.pop(tenant, None)
        return 0 if registry is None else len(registry.latest)
