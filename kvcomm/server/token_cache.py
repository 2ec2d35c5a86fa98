"""Tokens of texts that come again and again, as system prompts do: tokenizing takes a millisecond per thousand letters.

Kept apart by namespace, so that times tell nobody what another tenant, or another salt, has sent; and under digests, so
that no text is held here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from blake3 import blake3

MIN_CHARACTERS = 256
"""Shorter texts are tokenized sooner than looked up."""

MAX_TOKENS = 500_000
"""Of all texts together, about 20 MB; over it, the least recently used ones go."""

Space = tuple[str, str | None]
"""A tenant and a salt."""


class TokenCache:
    """Safe to use from several threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Space, bytes], tuple[int, ...]] = OrderedDict()
        self._num_tokens = 0

    def tokens(self, space: Space, text: str, make: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """The tokens of a text, made unless they are known in this namespace."""
        if len(text) < MIN_CHARACTERS:
            return make(text)
        key = space, blake3(text.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
        made = make(text)
        if 0 < len(made) <= self._max_tokens:  # what has no tokens would never be dropped
            with self._lock:
                self._keep(key, made)
        return made

    def forget(self, tenant: str) -> None:
        """Drop what a tenant has sent, under all salts."""
        with self._lock:
            for key in [key for key in self._known if key[0][0] == tenant]:
                self._num_tokens -= len(self._known.pop(key))

    def _keep(self, key: tuple[Space, bytes], made: tuple[int, ...]) -> None:
        self._num_tokens += len(made) - len(self._known.get(key, ()))
        self._known[key] = made
        while self._num_tokens > self._max_tokens:
            _, dropped = self._known.popitem(last=False)
            self._num_tokens -= len(dropped)
