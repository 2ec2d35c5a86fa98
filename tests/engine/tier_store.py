"""A store of a tier that does whatever a test wants it to: loses, alters, refuses, or stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from kvcomm.errors import ObjectMissing, StoreFailed
from kvcomm.tiers.store import StoredObject


class FaultyStore:
    """Objects in memory.

    Attributes:
        is_failing: whether everything fails from now on.
        open_for_reads, open_for_writes: reads or writes stand still while these are not set.
        num_gets: whole objects that were asked for.
    """

    kind = "folder"
    url = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_failing = False
        self.open_for_reads, self.open_for_writes = threading.Event(), threading.Event()
        self.open_for_reads.set()
        self.open_for_writes.set()
        self.num_gets = 0

    def get(self, key: str) -> memoryview:
        self.num_gets += 1
        self._wait(self.open_for_reads)
        if (content := self.objects.get(key)) is None:
            raise ObjectMissing(f"there is no {key}")
        return memoryview(bytearray(content))

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        self._wait(None)
        if (content := self.objects.get(key)) is None:
            raise ObjectMissing(f"there is no {key}")
        return memoryview(bytearray(content[start : start + length]))

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        self._wait(self.open_for_writes)
        content = b"".join(bytes(part) for part in parts)
        return self.objects.setdefault(key, content) is content

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        self._wait(None)
        for key, content in list(self.objects.items()):
            if key.startswith(prefix):
                yield StoredObject(key, len(content), time.time(), time.time())

    def delete(self, key: str) -> None:
        self._wait(None)
        self.objects.pop(key, None)

    def sweep(self) -> int:
        return 0

    def close(self) -> None:
        """Let whatever stands still go on, to its end."""
        self.is_failing = True
        self.open_for_reads.set()
        self.open_for_writes.set()

    def alter(self, index: int) -> None:
        """Change a byte in the middle of an object."""
        if self.objects:
            key = sorted(self.objects)[index % len(self.objects)]
            content = bytearray(self.objects[key])
            content[len(content) // 2] ^= 1
            self.objects[key] = bytes(content)

    def lose(self, index: int) -> None:
        """Forget an object."""
        if self.objects:
            del self.objects[sorted(self.objects)[index % len(self.objects)]]

    def _wait(self, gate: threading.Event | None) -> None:
        if gate is not None:
            gate.wait()
        if self.is_failing:
            raise StoreFailed("the store cannot be reached")
