"""Which texts cannot fit the model, found out without tokenizing them.

A tokenizer that loses nothing gives a text at least one token for as many bytes as its longest token has. Where that
says too little, the beginning of a text is tokenized alone: one that has far more tokens than the model takes is not
worth going on with. So what tokenizing costs is bounded by the model's limit, whatever a client sends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from kvcomm.errors import PromptTooLong

CHARACTERS_PER_TOKEN = 12
"""Of a beginning: so many for every token of the model's limit; texts of people have four or five."""

SURELY = 2
"""A beginning with so many times the model's limit: the rest joins no two of its tokens in three."""

COMPOSED = 4
"""Unicode composition makes one character of so many at most, and of no more than so many times its bytes."""

KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts"})
"""Ways to cut a text before it is tokenized that keep all of it, unless they are told to remove something."""

BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Those that UTF-8 has."""

BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in BYTES)


class TextLimit:
    """The limit of one model. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        longest = longest_token_bytes(tokenizer)
        self.max_bytes = None if longest is None else longest * max_context
        self._num_probed = CHARACTERS_PER_TOKEN * max_context

    def require(self, text: str) -> None:
        """Raises PromptTooLong for a text that surely has more tokens than the model takes."""
        if len(text) <= self._num_probed and (self.max_bytes is None or len(text) * 4 <= self.max_bytes):
            return
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise PromptTooLong(
                f"a text of {num_bytes} bytes has more tokens than the model's limit of {self._max_context}: those "
                f"hold {self.max_bytes} bytes at most"
            )
        if len(text) > self._num_probed:
            beginning = text[: self._num_probed]
            num_tokens = len(self._tokenizer.encode(beginning, add_special_tokens=False, verbose=False))
            if num_tokens > SURELY * self._max_context:
                raise PromptTooLong(
                    f"the first {len(beginning)} characters of a text of {len(text)} have {num_tokens} tokens, and "
                    f"the model's limit is {self._max_context}"
                )


def longest_token_bytes(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Bytes of text that one token stands for at most; None where that cannot be said.

    It can where every character of a text comes to stand in a token: nothing is taken out before tokenizing, and what
    the vocabulary does not know becomes a token for each byte or character.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    normalizers = _steps(backend.normalizer, "normalizers")
    cutters = _steps(backend.pre_tokenizer, "pretokenizers")
    if normalizers is None or cutters is None:
        return None
    factor = 1
    for step in normalizers:
        if step["type"] in ("NFC", "NFKC"):
            factor = COMPOSED
        elif step["type"] not in ("NFD", "NFKD", "Prepend", "ByteLevel") and not _is_longer(step):
            return None
    if any(step["type"] not in KEEPING or step.get("behavior") == "Removed" for step in cutters):
        return None
    is_byte_level = any(step["type"] == "ByteLevel" for step in (*normalizers, *cutters))
    vocabulary = tokenizer.get_vocab()
    if not ((is_byte_level and vocabulary.keys() >= _byte_letters()) or _spells_unknown(backend.model, vocabulary)):
        return None
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return None  # such a token takes any number of spaces into it
    longest = max((len(token.encode()) for token in added), default=1)
    # Byte-level tokens have one letter for each byte; others may be as many bytes as they look.
    return factor * max(longest, *(len(token) if is_byte_level else len(token.encode()) for token in vocabulary))


@cache
def _byte_letters() -> frozenset[str]:
    """What byte-level tokenizers write for the bytes that UTF-8 has."""
    two = "".join(map(chr, range(0x800)))  # every byte below 0x80, every continuation, and what begins two bytes
    more = "".join(chr(0x800 * step) for step in range(1, 0x220) if not 0xD800 <= 0x800 * step < 0xE000)
    cut = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(two + more)
    return frozenset("".join(piece for piece, _ in cut))


def _steps(component: Any, name: str) -> list[dict[str, Any]] | None:
    """What a normalizer or pre-tokenizer is made of; None: it does not say."""
    if component is None:
        return []
    try:
        state = json.loads(component.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return None
    return list(state[name]) if state["type"] == "Sequence" else [state]


def _is_longer(step: dict[str, Any]) -> bool:
    """Whether it replaces a fixed text by one of at least as many bytes."""
    pattern = step.get("pattern", {}).get("String") if step["type"] == "Replace" else None
    return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())


def _spells_unknown(model: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether what its vocabulary does not know becomes a token for each byte."""
    return bool(getattr(model, "byte_fallback", False)) and vocabulary.keys() >= BYTE_PIECES
