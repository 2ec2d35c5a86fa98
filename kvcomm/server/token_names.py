"""What tokens are called where no two of a place may be called alike: in OpenAI's older form of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from kvcomm.engine.engine import Engine

NUM_KNOWN = 65_536
"""Names that are kept."""


class TokenNames:
    """Names of one model's tokens. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = lru_cache(NUM_KNOWN)(self._name)
        self.text = lru_cache(NUM_KNOWN)(engine.texts.token_text)

    def apart(self, token_ids: Sequence[int]) -> dict[int, str]:
        """Names of the tokens of one place, no two alike: where texts are the same, the first token has it."""
        names: dict[int, str] = {}
        taken: set[str] = set()
        for token_id in token_ids:
            if token_id not in names:
                name = self.name(token_id)
                names[token_id] = f"token_id:{token_id}" if name in taken else name
                taken.add(names[token_id])
        return names

    def _name(self, token_id: int) -> str:
        """A token's text; what is a part of a character only is told by its bytes, as OpenAI does it."""
        data = self._engine.texts.token_bytes(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self.text(token_id)
