"""Stores for tests: one in a dictionary that can be told to fail, and the real ones where they can be had.

Redis is started if there is a `redis-server` in the path, or one at `KVCOMM_REDIS_SERVER`; it is looked for, never
installed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL

from eval.moto import free_port, is_open
from kvcomm.errors import ObjectMissing, StoreFailed
from kvcomm.tiers.store import StoredObject, safe_key, safe_prefix
from tests.limits import process, wait_for


class DictStore:
    """Objects in a dictionary.

    Attributes:
        before: called with each operation's name and key before it is done; may raise, wait or change `objects`.
        calls: operations and keys, in order.
    """

    kind = "dict"
    url = "dict:"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, float] = {}
        self.before: Callable[[str, str], object] = lambda operation, key: None
        self.calls: list[tuple[str, str]] = []

    def get(self, key: str) -> memoryview:
        self._called("get", safe_key(key))
        return memoryview(bytearray(self._there(key)))

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        self._called("get_range", safe_key(key))
        return memoryview(bytearray(self._there(key)[start : start + length]))

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        self._called("put_once", safe_key(key))
        if key in self.objects:
            return False
        self.objects[key] = b"".join(parts)
        self.times[key] = time.time()
        return True

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        start = safe_prefix(prefix)
        self._called("list", start)
        for key, content in list(self.objects.items()):
            if not start or key.startswith(start + "/"):
                moment = self.times.get(key, 0.0)
                yield StoredObject(key, len(content), moment, moment)

    def delete(self, key: str) -> None:
        self._called("delete", safe_key(key))
        self.objects.pop(key, None)

    def sweep(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is open."""

    def fail(self, *operations: str) -> None:
        """From now on these fail; none: nothing does."""

        def before(operation: str, key: str) -> None:
            if operation in operations:
                raise StoreFailed(f"{key} cannot be had: the wire is cut")

        self.before = before

    def _there(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectMissing(f"there is no {key}")
        return self.objects[key]

    def _called(self, operation: str, key: str) -> None:
        self.calls.append((operation, key))
        self.before(operation, key)


def redis_server() -> str | None:
    """The program, if there is one."""
    return os.environ.get("KVCOMM_REDIS_SERVER") or shutil.which("redis-server")


@contextmanager
def redis_running(program: str, folder: Path) -> Iterator[str]:
    """The URL of an empty Redis server."""
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with process(command, stdout=DEVNULL, stderr=DEVNULL) as server:
        wait_for(lambda: server.poll() is not None or is_open(port))
        assert server.poll() is None, "the Redis server ended"
        yield f"redis://127.0.0.1:{port}/0"
