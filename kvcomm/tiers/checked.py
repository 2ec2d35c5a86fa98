"""The objects of a tier as records that are sealed under their names: read and checked, written once, counted.

Nothing here raises for what the store did: whatever is gone, torn, altered, foreign, slow or refused is a `TierMiss`.
What is damaged is removed, so that it can be written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Protocol

from kvcomm.errors import ObjectMissing, RecordCorrupt, RecordTooNew, StoreFailed
from kvcomm.files.reading import BadContent
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.tiers.counting import Counts, KnownKeys
from kvcomm.tiers.inventory import leading_bytes
from kvcomm.tiers.janitor import Swept, sweep
from kvcomm.tiers.keys import ChainLink, SpaceKeys
from kvcomm.tiers.pace import Pace
from kvcomm.tiers.record import SEAL, Record, RecordHeader, unpack_header, unpack_record
from kvcomm.tiers.space import RenditionName, TierMiss
from kvcomm.tiers.store import ObjectStore, StoredObject
from kvcomm.tiers.write_queue import WriteQueue, WriteTask

PROBE_BYTES = 64
MAX_LISTED = 64
"""Renditions of a segment, or versions of a blob, that are looked at."""
SWEEP_S = 60.0
"""Seconds between looks at the byte budget."""


class Check(Protocol):
    """Whether a header is the one that was asked for."""

    def __call__(self, header: RecordHeader) -> bool:
        """False: it is foreign."""


class CheckedObjects:
    """What a tier asks of its store. Safe to use from several threads.

    Attributes:
        reads, writes: what they cost.
        counts: what was read, written, missed and damaged.
        known: keys that are there, as far as is known.
    """

    def __init__(
        self,
        store: ObjectStore,
        queue: WriteQueue,
        *,
        max_bytes: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one.

        Args:
            queue: where the janitor's work goes.
            max_bytes: that the janitor keeps the store within; None: it is left to others.
        """
        self._store = store
        self._queue = queue
        self._max_bytes = max_bytes
        self._clock = clock
        self.reads, self.writes = Pace(clock), Pace(clock)
        self.counts = Counts()
        self.known = KnownKeys(clock)
        self._lock = Lock()
        self._written_bytes = 0
        self._swept_s = clock()

    def is_there(self, key: str) -> bool:
        """Whether there is an object of that name, as far as is known or asking tells."""
        if key in self.known:
            return True
        try:
            start_s = self._clock()
            self._store.get_range(key, 0, PROBE_BYTES)
            self.reads.done(0, self._clock() - start_s)
        except ObjectMissing:
            self.reads.done(0, self._clock() - start_s)
            return False
        except StoreFailed as error:
            self._trouble(self.reads, error)
            return False
        self.known.add(key)
        return True

    def num_leading(self, keys: Sequence[str]) -> int:
        """How many leading ones of these names are there, if they are there in order."""
        held, missing = 0, len(keys) + 1  # all of the first `held` are there, the `missing`-th is not
        step = 1
        while held + 1 < missing:
            middle = min(held + step, missing - 1) if missing > len(keys) else (held + missing) // 2
            if self.is_there(keys[middle - 1]):
                held, step = middle, 2 * step
            else:
                missing = middle
            if self.reads.is_failing:
                return held
        return held

    def read(self, keys: SpaceKeys, key: str, check: Check) -> Record | TierMiss:
        """A record that is whole, sealed under its name, of the space, and the one that was asked for."""
        start_s = self._clock()
        try:
            content = self._store.get(key)
            record = unpack_record(key, content)
        except ObjectMissing:
            self.known.discard(key)
            return self.counts.miss(TierMiss.ABSENT)
        except StoreFailed as error:
            self._trouble(self.reads, error)
            return self.counts.miss(TierMiss.FAILED)
        except RecordTooNew:
            return self.counts.miss(TierMiss.TOO_NEW)
        except RecordCorrupt as error:
            return self._damaged(key, TierMiss.CORRUPT, str(error))
        if not record.header.is_of(keys.space) or not check(record.header):
            return self._damaged(key, TierMiss.FOREIGN, "it is not what its name says")
        if not record.is_sealed(partial(keys.seal, key)):
            return self._damaged(key, TierMiss.FOREIGN, "its seal is not that of its tenant")
        if record.header.kind in ("prefix", "rendition") and not record.kv().is_finite():
            return self._damaged(key, TierMiss.CORRUPT, "it holds numbers that are not finite")
        if not keys.space.knows(record.header.token_ids):
            return self._damaged(key, TierMiss.FOREIGN, "it holds tokens that the model does not know")
        seconds = self._clock() - start_s
        self.reads.done(len(content), seconds)
        self.counts.read(len(content), seconds)
        self.known.add(key)
        return record

    def read_header(self, keys: SpaceKeys, key: str) -> RecordHeader | None:
        """The header of a record that is sealed under its name; its tensors are not read."""
        try:
            header, metadata = unpack_header(key, leading_bytes(self._store, key))
        except (ObjectMissing, BadContent, RecordCorrupt, RecordTooNew):
            return None
        except StoreFailed as error:
            self._trouble(self.reads, error)
            return None
        is_sealed = metadata.get(SEAL) == keys.seal(key, metadata["header_blake3"])
        return header if is_sealed and header.is_of(keys.space) else None

    def listed(self, prefix: str, max_listed: int | None = MAX_LISTED) -> list[StoredObject]:
        """Objects below a folder, the newest first."""
        try:
            found = sorted(self._store.list(prefix), key=lambda each: (each.modified_s, each.key), reverse=True)
        except StoreFailed as error:
            self._trouble(self.reads, error)
            return []
        return found[:max_listed]

    def put(self, key: str, parts: Sequence[memoryview]) -> bool:
        """Write an object; whether it was written."""
        num_bytes = sum(part.nbytes for part in parts)
        start_s = self._clock()
        try:
            is_new = self._store.put_once(key, parts)
        except StoreFailed as error:
            self._trouble(self.writes, error)
            self.counts.unwritten()
            return False
        seconds = self._clock() - start_s
        self.known.add(key)
        if is_new:
            self.writes.done(num_bytes, seconds)
            self.counts.written(num_bytes, seconds)
            self._sweep_if_due(num_bytes)
        return is_new

    def delete(self, key: str) -> None:
        """Remove an object, if it can be."""
        self.known.discard(key)
        try:
            self._store.delete(key)
        except StoreFailed as error:
            self.counts.trouble(error)

    def _damaged(self, key: str, miss: TierMiss, reason: str) -> TierMiss:
        """Remove what cannot be used: nobody could write the right thing in its place."""
        self.counts.damaged(key, reason)
        self.delete(key)
        return self.counts.miss(miss)

    def _trouble(self, pace: Pace, error: StoreFailed) -> None:
        pace.failed()
        self.counts.trouble(error)

    def _sweep_if_due(self, num_bytes: int) -> None:
        """Queue the janitor where enough was written, or long ago enough, since it last came."""
        if self._max_bytes is None:
            return
        with self._lock:
            self._written_bytes += num_bytes
            is_due = self._written_bytes > self._max_bytes // 20 or self._clock() - self._swept_s > SWEEP_S
            if is_due:
                self._written_bytes, self._swept_s = 0, self._clock()
        if is_due:
            self._queue.add(WriteTask("janitor", 0, self.sweep, lambda: None))

    def sweep(self) -> Swept | None:
        """Bring the tier within its byte budget and remove leftovers; None: that could not be done."""
        try:
            return sweep(self._store, max_bytes=self._max_bytes)
        except StoreFailed as error:
            self.counts.trouble(error)
            return None


def is_run(link: ChainLink, token_ids: Sequence[int], run_tokens: int, header: RecordHeader) -> bool:
    """Whether a header is that of one run of a prefix."""
    wanted = tuple(token_ids[link.start : link.start + run_tokens])
    return (header.kind, header.fidelity, header.start, header.parent, header.token_ids) == (
        "prefix",
        Fidelity.EXACT,
        link.start,
        link.parent,
        wanted,
    )


def is_rendition(name: RenditionName, fidelity: Fidelity, header: RecordHeader) -> bool:
    """Whether a header is that of this rendition, in this fidelity."""
    part = header.rendition
    if part is None or header.kind != "rendition" or header.fidelity is not fidelity:
        return False
    is_named = RenditionName(part.digest, part.signature, header.start) == name
    return is_named and Segment(header.token_ids).digest(header.namespace) == name.digest
