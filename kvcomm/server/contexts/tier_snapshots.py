"""Snapshots in a shared tier: what one server saves, another one restores.

For servers with a tier and no folder for snapshots. Each snapshot is two objects of its tenant: the file as a folder
would have it, and what there is to say about it, so that listing reads no KV. Two servers that save under one new name
at once may both succeed, and the later one stays; a tenant may be over its number of snapshots by as many as servers
save at once. For worker threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.server.contexts.conversation import KeptConversation
from kvcomm.server.contexts.snapshots import SnapshotFolder, taken
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.contexts import SnapshotObject
from kvcomm.tiers.tier import Tier, TierMiss

INFO = " info"
"""Behind a name: what there is to say about that snapshot; no snapshot's name has a space."""


class TierSnapshots:
    """The snapshots of one tenant in a tier; see `SnapshotFolder` for what each method promises."""

    def __init__(self, engine: Engine, tier: Tier, tenant: str, *, max_snapshots: int) -> None:
        self._tier = tier
        self._space = engine.tiering.home_space(tenant)
        self._max_snapshots = max_snapshots

    def save(self, context: Context, name: str, *, replace: bool) -> SnapshotObject:
        """Write a context, whole or not at all."""
        names = self._names()
        if name in names and not replace:
            raise taken(name)
        if name not in names and len(names) >= self._max_snapshots:
            message = f"this tenant has {len(names)} of at most {self._max_snapshots} snapshots; delete some"
            raise ApiError(429, "quota_exceeded", message, retry_after_s=1)
        with _folder() as folder:
            snapshot = folder.save(context, name, replace=True)
            content = folder.file(name).read_bytes()
        info = snapshot.model_dump_json().encode()
        written = self._put(name, content) and self._put(name + INFO, info)
        if not written:
            raise self._failed(name)
        return snapshot

    def snapshots(self) -> list[SnapshotObject]:
        """All of them by name."""
        found = [self._info(name) for name in self._names()]
        return [each for each in found if each is not None]

    def num_tokens(self, name: str) -> int:
        """Tokens that a snapshot says it has."""
        info = self._info(name)
        if info is None:
            raise self._missing(name)
        return info.tokens or 0

    def restore(
        self, engine: Engine, name: str, *, space: str, adapter: str | None = None
    ) -> tuple[Context, KeptConversation | None]:
        """A context from a snapshot, and its conversation."""
        content = self._tier.get_blob(self._space, "snapshot", name)
        if isinstance(content, TierMiss):
            raise self._missing(name) if content is TierMiss.ABSENT else self._failed(name)
        with _folder() as folder:
            folder.file(name).parent.mkdir(exist_ok=True)
            folder.file(name).write_bytes(content)
            return folder.restore(engine, name, space=space, adapter=adapter)

    def remove(self, name: str) -> None:
        """Delete a snapshot, in whatever state it is."""
        there = [self._tier.delete_blob(self._space, "snapshot", each) for each in (name, name + INFO)]
        if not any(there):
            raise self._missing(name)

    def _names(self) -> list[str]:
        listed = self._tier.list_blobs(self._space, "snapshot")
        return [name.removesuffix(INFO) for name in listed if name.endswith(INFO)]

    def _info(self, name: str) -> SnapshotObject | None:
        content = self._tier.get_blob(self._space, "snapshot", name + INFO)
        if isinstance(content, TierMiss):
            return None
        try:
            return SnapshotObject.model_validate_json(content)
        except ValidationError:
            return None

    def _put(self, name: str, content: bytes) -> bool:
        return self._tier.put_blob(self._space, "snapshot", name, content)

    def _missing(self, name: str) -> ApiError:
        if self._tier.stats().is_failing:
            return self._failed(name)
        return ApiError(404, "snapshot_not_found", f"there is no snapshot {name!r}", param="name")

    def _failed(self, name: str) -> ApiError:
        message = f"snapshot {name!r} cannot be read or written now: the shared tier fails or refuses"
        return ApiError(503, "snapshot_failed", message, retry_after_s=1)


@contextmanager
def _folder() -> Iterator[SnapshotFolder]:
    """A folder for as long as a snapshot is made or taken apart."""
    with tempfile.TemporaryDirectory(prefix="kvcomm-") as root:
        yield SnapshotFolder(Path(root), "snapshot", max_snapshots=1)
