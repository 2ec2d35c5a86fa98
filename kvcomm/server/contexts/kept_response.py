"""A response between requests, kept with the context that it ends: one JSON text, so that its size can be counted."""

from __future__ import annotations

import json
from typing import Any


class KeptResponse:
    """Never changes. It holds what was answered, and all items of the conversation up to its own."""

    __slots__ = ("_text",)

    def __init__(self, values: dict[str, Any]) -> None:
        """`values` are JSON values; see `kvcomm.server.responses.keeping.Stored`."""
        self._text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self._text)

    def read(self) -> Any:
        """The values; takes time like its length."""
        return json.loads(self._text.decode("utf-8", "surrogatepass"))
