"""What one replica holds, as it tells routers: keys of what it has served lately, and the families it has taken over.

Bounded in number, the least recently used go first. What the engine has evicted meanwhile is still told for a while,
which costs a router's mistake and no wrong answer. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from kvcomm.integrations.ray.routing import Wanted

MAX_KEYS = 2048
MAX_FAMILIES = 4096
HELD, RESTORED, LOAD = "held", "restored", "load"
"""Names in what a replica tells."""


class Recent:
    """Names in the order of their last use; the oldest go."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._names: OrderedDict[str, str] = OrderedDict()

    def put(self, name: str, value: str = "") -> None:
        """Note a name, with what stands behind it."""
        self._names[name] = value
        self._names.move_to_end(name)
        while len(self._names) > self._max_names:
            self._names.popitem(last=False)

    def get(self, name: str) -> str | None:
        """What stands behind a name; None: it is not known."""
        return self._names.get(name)

    def drop(self, name: str) -> None:
        """Forget a name, if it is known."""
        self._names.pop(name, None)

    def items(self) -> dict[str, str]:
        """A copy, the oldest first."""
        return dict(self._names)


class Holding:
    """What a replica holds and what it has still to do."""

    def __init__(self, max_keys: int = MAX_KEYS, max_families: int = MAX_FAMILIES) -> None:
        self._lock = threading.Lock()
        self._keys = Recent(max_keys)
        self._families = Recent(max_families)
        self._load = 0

    def begin(self, wanted: Wanted) -> None:
        """A request has come."""
        with self._lock:
            self._load += wanted.num_tokens

    def end(self, wanted: Wanted, *, is_served: bool) -> None:
        """A request that had begun has ended; what was served is held now."""
        with self._lock:
            self._load -= wanted.num_tokens
            for key in wanted.all_keys() if is_served else ():
                self._keys.put(key)

    def take_over(self, family: str) -> None:
        """Contexts of a replica that is gone are here now."""
        with self._lock:
            self._families.put(family)

    def stats(self) -> dict[str, Any]:
        """For routers."""
        with self._lock:
            return {HELD: list(self._keys.items()), RESTORED: list(self._families.items()), LOAD: self._load}
