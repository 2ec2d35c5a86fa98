"""KV by its meaning, in a store that other processes share.

A `Tier` names, seals, checks and counts. Nothing it is asked raises for what the tier did: whatever is gone, torn,
altered, foreign, slow or refused is a `TierMiss`, and means to compute. What it gives has been checked to the last byte
against its digests, its seal and the tokens that were asked for. What is damaged is removed, so that it can be written
again. It knows nothing of pools and engines, and never decides whether a get is worth it: `is_worth` says so.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

from kvcomm.errors import InvalidRequest
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.tiers.checked import PROBE_BYTES, CheckedObjects, is_rendition, is_run
from kvcomm.tiers.counting import TierStats
from kvcomm.tiers.deadline import LateReads
from kvcomm.tiers.janitor import Swept
from kvcomm.tiers.keys import ChainLink, SpaceKeys, require_secret, tenant_key
from kvcomm.tiers.opening import open_store
from kvcomm.tiers.record import (
    BlobKind,
    NamedSegment,
    Record,
    RecordHeader,
    RenditionPart,
    header_of,
    pack_blob,
    pack_kv,
)
from kvcomm.tiers.space import KV, PrefixRead, RenditionName, StoredRendition, TierMiss, TierSpace
from kvcomm.tiers.store import ObjectStore
from kvcomm.tiers.write_queue import Dropped, WriteQueue, WriteTask
from kvcomm.values import text, whole_number

__all__ = ["KV", "PrefixRead", "RenditionName", "StoredRendition", "Tier", "TierMiss", "TierSpace", "TierStats"]

RUN_TOKENS = 256
MAX_SPACES = 4096
"""Whose keys are kept; made again where there are more."""
WRITE_S = 10.0
"""Seconds that writing one object may be expected to take."""
CLOSE_S = 5.0


class Tier:
    """A shared tier. Safe to use from several threads.

    Attributes:
        kind: of the store: "folder", "s3", "gs", "az" or "redis".
        url: of the store, without anything secret.
        run_tokens: tokens of each object of a prefix.
        reads, writes: what they cost.
        queue: what is written off the critical path.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        secret: bytes | None = None,
        max_bytes: int | None = None,
        run_tokens: int = RUN_TOKENS,
        queue: WriteQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `open`; the store is the tier's own from here on."""
        self._store = store
        self._secret = require_secret(secret)
        self.run_tokens = whole_number("run_tokens", run_tokens)
        if self.run_tokens < 1:
            raise InvalidRequest(f"run_tokens must be 1 or more, not {run_tokens}")
        self.kind, self.url = store.kind, store.url
        self.queue = queue or WriteQueue()
        self._objects = CheckedObjects(store, self.queue, max_bytes=max_bytes, clock=clock)
        self.reads, self.writes, self._counts = self._objects.reads, self._objects.writes, self._objects.counts
        self._known, self._late, self._keys = self._objects.known, LateReads(), dict[TierSpace, SpaceKeys]()
        self._lock = Lock()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        url: str,
        *,
        secret: bytes | None = None,
        max_bytes: int | None = None,
        run_tokens: int = RUN_TOKENS,
    ) -> Tier:
        """The tier at a URL.

        Args:
            url: see `kvcomm.tiers.opening.open_store`.
            secret: of all who share the tier, 16 bytes or more. Without one only the default tenant's KV is kept, under
                names that everybody can make; other tenants are refused, as anybody could ask for what is theirs.
            max_bytes: that this tier's janitor keeps it within; None: it is left to others.
            run_tokens: tokens of each object of a prefix; only tiers opened with the same number share prefixes.

        Raises:
            TierError: no such kind of store, it cannot be opened, or the secret is too short.
            MissingExtra: the package that it needs is not installed.
            InvalidRequest: a number that cannot be.
        """
        if max_bytes is not None and whole_number("max_bytes", max_bytes) < 1:
            raise InvalidRequest(f"max_bytes must be 1 or more, or None, not {max_bytes}")
        require_secret(secret)
        return cls(open_store(url), secret=secret, max_bytes=max_bytes, run_tokens=run_tokens)

    def serves(self, tenant: str) -> bool:
        """Whether this tier keeps KV of a tenant."""
        return tenant_key(self._secret, tenant) is not None

    def is_worth(self, num_bytes: int, compute_s: float) -> bool:
        """Whether reading so many bytes is expected to be clearly faster than computing; see `Pace.is_worth`."""
        return self.reads.is_worth(num_bytes, compute_s)

    def prefix_length(self, space: TierSpace, token_ids: Sequence[int], *, deadline_s: float | None = None) -> int:
        """Leading tokens that are held, in whole runs.

        Their number is found by bisection; where one in the middle is lost, reading says so.

        Args:
            deadline_s: seconds after which 0 is returned.
        """
        keys = self._keys_of(space)
        if keys is None or not space.knows(token_ids):
            return 0
        links = keys.chain(token_ids, self.run_tokens)
        found = self._late.within(
            deadline_s,
            partial(self._objects.num_leading, [keys.prefix(link) for link in links]),
            self._seconds_late(PROBE_BYTES),
        )
        return 0 if found is None else found * self.run_tokens

    def read_prefix(
        self, space: TierSpace, token_ids: Sequence[int], start: int, end: int, *, deadline_s: float | None = None
    ) -> PrefixRead:
        """KV of the leading runs of the tokens [start, end) of a prefix; the tensors are views of what was read.

        Args:
            token_ids: the prefix, at least to `end`.
            start, end: multiples of `run_tokens`.
            deadline_s: seconds after which only what has come is returned. What is being read then is read on, for its
                time to be learned.

        Raises:
            InvalidRequest: start and end are not such multiples, or not in this order.
        """
        size = self.run_tokens
        if not 0 <= start < end <= len(token_ids) or start % size or end % size:
            raise InvalidRequest(f"[{start}, {end}) are not whole runs of {size} of {len(token_ids)} tokens")
        keys = self._keys_of(space)
        if keys is None:
            return PrefixRead([], TierMiss.REFUSED)
        if not space.knows(token_ids):
            return PrefixRead([], self._counts.miss(TierMiss.ABSENT))
        links = keys.chain(token_ids[:end], size)[start // size :]
        runs: list[KV] = []
        work = partial(self._read_runs, keys, links, token_ids, runs)
        late = self._seconds_late(space.token_bytes * size)
        if (ended := self._late.within(deadline_s, work, late)) is not None:
            return ended
        self._counts.miss(TierMiss.SLOW)
        return PrefixRead(list(runs), TierMiss.SLOW)

    def put_prefix(self, space: TierSpace, token_ids: Sequence[int], kv: KV, start: int = 0) -> int:
        """Write the whole runs of a prefix that are not there yet; returns how many were written.

        Args:
            kv: exact, of the tokens from `start` to the end.
            start: position of its first token; runs that begin before it are left out.

        Raises:
            InvalidRequest: KV and tokens do not have the shapes, dtype or vocabulary of the space.
        """
        self._require_fit(space, token_ids[start:], kv)
        keys = self._keys_of(space)
        if keys is None:
            return 0
        links = [link for link in keys.chain(token_ids, self.run_tokens) if link.start >= start]
        return sum(self._put_run(keys, link, token_ids, kv, start) for link in links)

    def put_prefix_later(
        self,
        space: TierSpace,
        token_ids: Sequence[int],
        load: Callable[[int], KV],
        *,
        num_bytes: int = 0,
        ended: Callable[[], object] = lambda: None,
    ) -> Dropped | None:
        """Queue the runs of a prefix that are not known to be there; returns why not, if so.

        Args:
            load: called in the queue's thread with the start of the first run that is missing; gives exact KV from
                there to the last whole run. Not called where nothing is missing.
            num_bytes: of memory that is held until then; bounds the queue.
            ended: called once whatever becomes of it.
        """
        keys = self._keys_of(space)
        links = keys.chain(token_ids, self.run_tokens) if keys and space.knows(token_ids) else []
        if keys is None or not links or all(keys.prefix(link) in self._known for link in links):
            ended()
            return None if links else Dropped.NOTHING
        ids = tuple(token_ids[: links[-1].start + self.run_tokens])
        write = partial(self._put_missing, keys, links, ids, load)
        return self.queue.add(WriteTask(keys.prefix(links[-1]), num_bytes, write, ended))

    def get_rendition(
        self,
        space: TierSpace,
        name: RenditionName,
        *,
        allows_approximate: bool = False,
        deadline_s: float | None = None,
    ) -> StoredRendition | TierMiss:
        """A rendition of a segment: the exact one, or else, where that is allowed, the approximate one."""
        keys = self._keys_of(space)
        if keys is None:
            return TierMiss.REFUSED
        miss = TierMiss.ABSENT
        for fidelity in (Fidelity.EXACT, Fidelity.APPROXIMATE)[: 1 + allows_approximate]:
            work = partial(self._read_rendition, keys, name, fidelity)
            got = self._late.within(deadline_s, work, self._seconds_late(space.token_bytes * self.run_tokens))
            if isinstance(got, StoredRendition):
                return got
            miss = TierMiss.SLOW if got is None else got
        return miss

    def list_renditions(
        self, space: TierSpace, digest: str, *, allows_approximate: bool = False
    ) -> list[RenditionName]:
        """What renditions of a segment there are, the newest first; only their headers are read."""
        keys = self._keys_of(space)
        if keys is None:
            return []
        names: list[RenditionName] = []
        for found in self._objects.listed(keys.renditions(digest)):
            header = self._objects.read_header(keys, found.key)
            if header is None or header.rendition is None or header.rendition.digest != digest:
                continue
            name = RenditionName(digest, header.rendition.signature, header.start)
            if (header.fidelity is Fidelity.EXACT or allows_approximate) and name not in names:
                names.append(name)
        return names

    def put_rendition(
        self,
        space: TierSpace,
        name: RenditionName,
        token_ids: Sequence[int],
        kv: KV,
        fidelity: Fidelity,
        *,
        slot: str = "",
        before: Sequence[Segment] = (),
        risk: float = 0.0,
    ) -> bool:
        """Write a rendition of a whole segment; False: it is there already, or could not be written.

        Args:
            kv: of the segment's tokens.
            slot, before, risk: see `StoredRendition`.

        Raises:
            InvalidRequest: the name's digest is not that of the tokens, or KV and tokens do not fit the space.
        """
        self._require_fit(space, token_ids, kv)
        if Segment(tuple(token_ids)).digest(space.namespace) != name.digest:
            raise InvalidRequest(f"{name.digest[:12]} is not the digest of the tokens under {space.namespace[:12]}")
        keys = self._keys_of(space)
        if keys is None or not self._may_write(kv.num_bytes):
            return False
        part = RenditionPart(
            digest=name.digest,
            signature=name.signature,
            slot=slot,
            before=tuple(NamedSegment(token_ids=each.token_ids, name=each.name) for each in before),
            risk=risk,
        )
        header = header_of(
            space, "rendition", fidelity=fidelity, token_ids=tuple(token_ids), start=name.position, rendition=part
        )
        return self._put_kv(keys, keys.rendition(name, fidelity), header, kv)

    def get_blob(
        self, space: TierSpace, kind: BlobKind, name: str, *, deadline_s: float | None = None
    ) -> bytes | TierMiss:
        """The newest whole version of a snapshot, bank, prior or reader."""
        keys = self._keys_of(space)
        if keys is None:
            return TierMiss.REFUSED
        got = self._late.within(
            deadline_s,
            partial(self._read_blob, keys, kind, name),
            self._seconds_late(space.token_bytes * self.run_tokens),
        )
        return TierMiss.SLOW if got is None else got

    def put_blob(self, space: TierSpace, kind: BlobKind, name: str, content: bytes) -> bool:
        """Write a new version, and remove the ones before it; False: it could not be written.

        Raises:
            InvalidRequest: the name holds half of a surrogate pair.
        """
        text("a blob's name", name)
        keys = self._keys_of(space)
        if keys is None or not self._may_write(len(content)):
            return False
        folder = keys.blob(kind, name)
        key = f"{folder}{time.time_ns():016x}-{secrets.token_hex(8)}"
        header = header_of(space, kind, name=name)
        if not self._objects.put(key, pack_blob(header, content, partial(keys.seal, key))):
            return False
        for older in self._objects.listed(folder)[1:]:
            self._objects.delete(older.key)
        return True

    def list_blobs(self, space: TierSpace, kind: BlobKind) -> list[str]:
        """The names of all of a kind, in order; only headers are read."""
        keys = self._keys_of(space)
        if keys is None:
            return []
        headers = (
            self._objects.read_header(keys, found.key)
            for found in self._objects.listed(keys.blobs(kind), max_listed=None)
        )
        return sorted({header.name for header in headers if header is not None and header.kind == kind})

    def delete_blob(self, space: TierSpace, kind: BlobKind, name: str) -> bool:
        """Remove all versions; whether there was one."""
        keys = self._keys_of(space)
        found = self._objects.listed(keys.blob(kind, name), max_listed=None) if keys is not None else []
        for each in found:
            self._objects.delete(each.key)
        return bool(found)

    def sweep(self) -> Swept | None:
        """Bring the tier within its byte budget and remove leftovers; None: that could not be done."""
        return self._objects.sweep()

    def stats(self) -> TierStats:
        """What was read, written, missed and dropped so far, and what it costs."""
        return self._counts.stats(self.kind, self.url, self.reads, self.writes, self.queue)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, within a time, and give up the store. Whatever is asked afterwards is refused."""
        self.queue.close(timeout_s)
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._store.close()

    def _keys_of(self, space: TierSpace) -> SpaceKeys | None:
        """Names of a space; None, counted as refused: it has none here."""
        with self._lock:
            keys = self._keys.get(space)
            if keys is None and (key := tenant_key(self._secret, space.tenant)) is not None:
                if len(self._keys) >= MAX_SPACES:
                    self._keys.clear()
                keys = self._keys[space] = SpaceKeys(key, space)
            is_refused = keys is None or self._is_closed
        if is_refused:
            self._counts.miss(TierMiss.REFUSED)
            return None
        return keys

    def _may_write(self, num_bytes: int) -> bool:
        return not self._is_closed and self.writes.is_worth(num_bytes, WRITE_S)

    def _seconds_late(self, num_bytes: int) -> Callable[[float], None]:
        return lambda seconds: self.reads.late(num_bytes, seconds)

    def _read_runs(
        self, keys: SpaceKeys, links: Sequence[ChainLink], token_ids: Sequence[int], runs: list[KV]
    ) -> PrefixRead:
        """Reads into `runs`, so that whoever does not wait until the end has what has come."""
        for link in links:
            got = self._objects.read(keys, keys.prefix(link), partial(is_run, link, token_ids, self.run_tokens))
            if isinstance(got, TierMiss):
                return PrefixRead(list(runs), got)
            runs.append(got.kv())
        return PrefixRead(list(runs), None)

    def _put_run(self, keys: SpaceKeys, link: ChainLink, token_ids: Sequence[int], kv: KV, start: int) -> bool:
        key, end = keys.prefix(link), link.start + self.run_tokens
        if not self._may_write(keys.space.token_bytes * self.run_tokens) or self._objects.is_there(key):
            return False
        ids = tuple(int(each) for each in token_ids[link.start : end])
        header = header_of(keys.space, "prefix", token_ids=ids, start=link.start, parent=link.parent)
        return self._put_kv(keys, key, header, kv.part(link.start - start, end - start))

    def _put_missing(
        self, keys: SpaceKeys, links: Sequence[ChainLink], token_ids: Sequence[int], load: Callable[[int], KV]
    ) -> None:
        held = self._objects.num_leading([keys.prefix(link) for link in links])
        if held < len(links) and self._may_write(keys.space.token_bytes * self.run_tokens):
            start = links[held].start
            self.put_prefix(keys.space, token_ids, load(start), start)

    def _put_kv(self, keys: SpaceKeys, key: str, header: RecordHeader, kv: KV) -> bool:
        if not kv.is_finite():
            self._counts.unwritten()
            return False
        return self._objects.put(key, pack_kv(header, kv, partial(keys.seal, key)))

    def _read_rendition(self, keys: SpaceKeys, name: RenditionName, fidelity: Fidelity) -> StoredRendition | TierMiss:
        got = self._objects.read(keys, keys.rendition(name, fidelity), partial(is_rendition, name, fidelity))
        if isinstance(got, TierMiss):
            return got
        part = got.header.rendition
        assert part is not None  # or it would have been foreign
        before = tuple(Segment(each.token_ids, each.name) for each in part.before)
        return StoredRendition(name, got.header.token_ids, got.kv(), fidelity, part.slot, before, part.risk)

    def _read_blob(self, keys: SpaceKeys, kind: BlobKind, name: str) -> bytes | TierMiss:
        versions = self._objects.listed(keys.blob(kind, name))
        miss = TierMiss.FAILED if self.reads.is_failing else TierMiss.ABSENT
        for found in versions:
            got = self._objects.read(keys, found.key, lambda header: header.kind == kind and header.name == name)
            if isinstance(got, Record):
                return got.blob()
            miss = got
        return miss if versions else self._counts.miss(miss)

    def _require_fit(self, space: TierSpace, token_ids: Sequence[int], kv: KV) -> None:
        if not space.fits(kv, len(token_ids)):
            raise InvalidRequest(
                f"KV of {kv.num_tokens} tokens and {len(kv.keys)} layers is not that of {len(token_ids)} tokens and "
                f"{len(space.shapes)} layers in {space.dtype_name} on the CPU, as its space says"
            )
        if not space.knows(token_ids):
            raise InvalidRequest(f"there are tokens beyond the {space.vocab_size} that the model knows")
