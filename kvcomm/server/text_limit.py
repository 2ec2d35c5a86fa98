"""Which texts cannot fit the model, found out without tokenizing them.

A tokenizer that loses nothing gives a text at least one token for as many bytes as its longest token has. Where that
says too little, the beginning of a text is tokenized alone: one that has far more tokens than the model takes is not
worth going on with. So what tokenizing costs is bounded by the model's limit, whatever a client sends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from kvcomm.errors import PromptTooLong

CHARACTERS_PER_TOKEN = 12
"""Of a beginning: so many for every token of the model's limit; texts of people have four or five."""

SURELY = 2
"""A beginning with so many times the model's limit: the rest joins no two of its tokens in three."""

COMPOSED = 4
"""Unicode composition makes one character of so many at most, and of no more than so many times its bytes."""

SLICE = 65_536
"""Characters that are encoded in one go."""

COMPOSING = frozenset({"NFC", "NFKC"})

KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts"})
"""Ways to cut a text before it is tokenized that keep all of it, unless they are told to remove something."""

BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class TextLimit:
    """The limit of one model. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        measure = TokenMeasure.of(tokenizer)
        self.max_bytes = None if measure is None else measure.longest_bytes * max_context
        self._dropped = b"" if measure is None else measure.dropped
        self._num_probed = CHARACTERS_PER_TOKEN * max_context

    def require(self, text: str) -> None:
        """Raises PromptTooLong for a text that surely has more tokens than the model takes."""
        if len(text) <= self._num_probed and (self.max_bytes is None or len(text) * 4 <= self.max_bytes):
            return
        if self.max_bytes is not None and self._has_more_bytes(text, self.max_bytes):
            raise PromptTooLong(
                f"a text of {len(text)} characters has more tokens than the model's limit of {self._max_context}: "
                f"those hold {self.max_bytes} bytes at most"
            )
        if len(text) > self._num_probed:
            beginning = text[: self._num_probed]
            num_tokens = len(self._tokenizer.encode(beginning, add_special_tokens=False, verbose=False))
            if num_tokens > SURELY * self._max_context:
                raise PromptTooLong(
                    f"the first {len(beginning)} characters of a text of {len(text)} have {num_tokens} tokens, and "
                    f"the model's limit is {self._max_context}"
                )

    def _has_more_bytes(self, text: str, most: int) -> bool:
        num_bytes = 0
        for start in range(0, len(text), SLICE):  # a copy of all of it would be as large again
            encoded = text[start : start + SLICE].encode("utf-8", "surrogatepass")
            num_bytes += len(encoded.translate(None, self._dropped))
            if num_bytes > most:
                return True
        return False


class TokenMeasure(NamedTuple):
    """How much text a token can stand for.

    Attributes:
        longest_bytes: of text, at most.
        dropped: bytes that come to stand in no token, and count for nothing.
    """

    longest_bytes: int
    dropped: bytes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenMeasure | None:
        """That of a tokenizer; None where it cannot be said.

        It can where nothing is taken out of a text before it is tokenized, and what the vocabulary does not know
        becomes tokens for bytes.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        normalizers = _steps(backend.normalizer, "normalizers")
        cutters = _steps(backend.pre_tokenizer, "pretokenizers")
        if normalizers is None or cutters is None or not all(map(_keeps_all, normalizers)):
            return None
        if any(step["type"] not in KEEPING or step.get("behavior") == "Removed" for step in cutters):
            return None
        added = tokenizer.added_tokens_decoder.values()
        if any(token.lstrip or token.rstrip for token in added):
            return None  # such a token takes any number of spaces into it
        vocabulary = tokenizer.get_vocab()
        is_byte_level = any(step["type"] == "ByteLevel" for step in (*normalizers, *cutters))
        if is_byte_level:
            dropped = bytes(byte for byte, letter in _byte_letters().items() if letter not in vocabulary)
        elif getattr(backend.model, "byte_fallback", False) and vocabulary.keys() >= BYTE_PIECES:
            dropped = b""
        else:
            return None
        longest = max((len(token.content.encode()) for token in added), default=1)
        # Byte-level tokens have one letter for each byte; others may be as many bytes as they look.
        longest = max(longest, *(len(token) if is_byte_level else len(token.encode()) for token in vocabulary))
        is_composed = any(step["type"] in COMPOSING for step in normalizers)
        return cls(longest * (COMPOSED if is_composed else 1), dropped)


def _byte_letters() -> dict[int, str]:
    """How byte-level tokenizers write bytes: those that print as themselves, the others as the letters from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _steps(component: Any, name: str) -> list[dict[str, Any]] | None:
    """What a normalizer or pre-tokenizer is made of; None: it does not say."""
    if component is None:
        return []
    try:
        state = json.loads(component.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return None
    return list(state[name]) if state["type"] == "Sequence" else [state]


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer takes nothing out of a text, but for what composition makes one of."""
    if step["type"] == "Replace":
        replaced = step.get("pattern", {}).get("String")
        return replaced is not None and len(step["content"].encode()) >= len(replaced.encode())
    return step["type"] in COMPOSING or step["type"] in ("NFD", "NFKD", "Prepend", "ByteLevel")
