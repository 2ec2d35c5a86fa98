"""A store in Redis: an object is a short record of its own and chunks of bounded size.

Chunks are written first, under a name that nobody knows and with an end to their life; then the record and the right to
stay are given in one step, to one writer. So a killed writer leaves nothing for long, and what Redis evicts to make
room is a whole object missing, never a part of one. Redis answers one command after another; chunks keep each of them
short.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvcomm.errors import MissingExtra, ObjectMissing, StoreFailed, TierError
from kvcomm.tiers.store import ObjectStore, StoredObject, is_safe, safe_key, safe_prefix, shown_url

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

OBJECTS, CHUNKS = "kvcomm:o:", "kvcomm:c:"
CHUNK_BYTES = 2**20
PIPELINE = 64
"""Chunks that are asked for or sent at once."""
SCAN = 1000
UNOWNED_S = 600
"""Seconds that chunks live which no record names."""
CONNECT_S, REQUEST_S = 5.0, 30.0

OWN = """
if redis.call('exists', unpack(KEYS)) ~= #KEYS - 1 or redis.call('exists', KEYS[1]) == 1 then return 0 end
redis.call('set', KEYS[1], ARGV[1])
for i = 2, #KEYS do redis.call('persist', KEYS[i]) end
return 1
"""
"""Give the record KEYS[1] to the chunks that follow, if it is not there and all of them are."""

DISOWN = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"
"""Remove the record KEYS[1] if it is still this one."""


class _Entry(NamedTuple):
    """An object's record: its chunks' common name, its bytes, and when it was written in milliseconds since 1970."""

    name: str
    num_bytes: int
    written_ms: int

    def chunks(self) -> list[str]:
        return [f"{CHUNKS}{self.name}:{index}" for index in range(-(-self.num_bytes // CHUNK_BYTES))]

    def packed(self) -> bytes:
        return f"{self.name} {self.num_bytes} {self.written_ms}".encode()


class RedisStore:
    """Objects in a database of a Redis server; see `ObjectStore` for what each method promises."""

    kind = "redis"

    def __init__(self, url: str, client: Redis) -> None:
        """`client`: gives bytes, not text; closed with the store."""
        self.url = url
        self._client: Any = client  # its own types say that every answer may have to be awaited

    def get(self, key: str) -> memoryview:
        """See `ObjectStore`."""
        with self._asking("read", safe_key(key)):
            packed, entry = self._entry(key)
            content = bytearray()
            for names in _batches(entry.chunks(), PIPELINE):
                for chunk in self._client.mget(names):
                    content += chunk or b""
            if len(content) != entry.num_bytes:
                if self._client.eval(DISOWN, 1, OBJECTS + key, packed):
                    self._drop(entry.chunks())
                raise ObjectMissing(f"parts of {key} are not in {self.url} any more")
            return memoryview(content)

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `ObjectStore`."""
        with self._asking("read", safe_key(key)):
            _, entry = self._entry(key)
            end = min(start + length, entry.num_bytes)
            pipeline = self._client.pipeline(transaction=False)
            for index, name in enumerate(entry.chunks()):
                offset = index * CHUNK_BYTES
                if offset < end and start < offset + CHUNK_BYTES:
                    pipeline.getrange(name, max(start - offset, 0), min(end - offset, CHUNK_BYTES) - 1)
            content = b"".join(pipeline.execute())
        if len(content) != max(end - start, 0):
            raise ObjectMissing(f"parts of {key} are not in {self.url} any more")
        return memoryview(bytearray(content))

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        """See `ObjectStore`."""
        content = memoryview(b"".join(parts))
        with self._asking("written", safe_key(key)):
            if self._client.exists(OBJECTS + key):
                return False
            seconds, micros = self._client.time()
            entry = _Entry(secrets.token_hex(16), len(content), seconds * 1000 + micros // 1000)
            names = entry.chunks()
            try:
                self._send(names, content)
                is_new = bool(self._client.eval(OWN, 1 + len(names), OBJECTS + key, *names, entry.packed()))
                is_there = is_new or bool(self._client.exists(OBJECTS + key))
            except BaseException:
                self._drop(names)
                raise
        if not is_new:
            self._drop(names)
        if not is_there:
            raise StoreFailed(f"{key} cannot be written in {self.url}: it was given up to make room, or took too long")
        return is_new

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore`."""
        start = safe_prefix(prefix)
        with self._asking("listed", start):
            match = f"{OBJECTS}{start}/*" if start else f"{OBJECTS}*"
            for names in _batches(self._client.scan_iter(match=match, count=SCAN), SCAN):
                for name, packed in zip(names, self._client.mget(names), strict=True):
                    key, entry = name.decode(errors="replace").removeprefix(OBJECTS), _parsed(packed)
                    if entry is not None and is_safe(key):
                        written_s = entry.written_ms / 1000
                        yield StoredObject(key, entry.num_bytes, written_s, written_s)

    def delete(self, key: str) -> None:
        """See `ObjectStore`."""
        with self._asking("removed", safe_key(key)):
            packed = self._client.getdel(OBJECTS + key)
            if (entry := _parsed(packed)) is not None:
                for names in _batches(entry.chunks(), PIPELINE):
                    self._client.unlink(*names)

    def sweep(self) -> int:
        """What killed writers leave goes by itself, `UNOWNED_S` seconds after it was written."""
        return 0

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _entry(self, key: str) -> tuple[bytes, _Entry]:
        packed = self._client.get(OBJECTS + key)
        entry = _parsed(packed)
        if entry is None:
            raise ObjectMissing(f"there is no {key} in {self.url}")
        return packed, entry

    def _send(self, names: Sequence[str], content: memoryview) -> None:
        for numbered in _batches(enumerate(names), PIPELINE):
            pipeline = self._client.pipeline(transaction=False)
            for index, name in numbered:
                chunk = content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                pipeline.set(name, bytes(chunk), ex=UNOWNED_S)
            pipeline.execute()

    def _drop(self, names: Sequence[str]) -> None:
        """Remove chunks that have no record; where that fails they go by themselves."""
        from redis import RedisError

        try:
            for some in _batches(names, PIPELINE):
                self._client.unlink(*some)
        except (RedisError, OSError):
            return

    @contextmanager
    def _asking(self, done: str, key: str) -> Iterator[None]:
        from redis import RedisError

        try:
            yield
        except (RedisError, OSError, ValueError) as error:
            raise StoreFailed(f"{key or 'it'} cannot be {done} in {self.url}: {_reason(error)}") from error


def open_redis(url: str) -> ObjectStore:
    """The store in a Redis server, as `redis://user:password@host:port/database`, `rediss://...` or `unix://...`.

    Raises:
        TierError: there is no such server, or it refuses.
        MissingExtra: redis-py or hiredis is not installed; without hiredis reading takes seconds.
    """
    try:
        import hiredis  # noqa: F401  # redis-py uses it where it is there
        from redis import Redis, RedisError
    except ImportError as error:
        raise MissingExtra(f"{shown_url(url)} needs redis-py with hiredis: pip install 'kvcomm[redis]'") from error
    shown = shown_url(url)
    try:
        client = Redis.from_url(url, socket_connect_timeout=CONNECT_S, socket_timeout=REQUEST_S)
        client.ping()
    except (RedisError, OSError, ValueError, TypeError) as error:
        raise TierError(f"{shown} cannot be used as a tier: {_reason(error)}") from error
    return RedisStore(shown, client)


def _parsed(packed: bytes | None) -> _Entry | None:
    """None: there is none, or it is not one of ours."""
    try:
        name, num_bytes, written_ms = (packed or b"").decode().split(" ")
        return _Entry(name, int(num_bytes), int(written_ms))
    except ValueError:
        return None


def _batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
