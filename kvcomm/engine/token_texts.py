"""What a tokenizer makes of ids: the text of many at once, and what is known about the text of each.

`decode` is the tokenizer's own and always right; the rest says how far the text of a growing answer can still change.
Nothing is guessed from the text alone: a fast tokenizer tells its decoder's steps, and one that does not tell them is
taken to change anything about its last token once there is another one behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REPLACEMENT = "\ufffd"

ANCHORS = ("a", "0", ".", "e", "x")
"""Texts of which the first one that the tokenizer knows stands before a token to see what it is behind other text."""

LOCAL_STEPS = frozenset(
    {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "Replace", "WordPiece", "BPEDecoder"}
)
"""Steps of decoders that leave the text of earlier tokens alone, but for what `TokenTexts` knows about."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The texts of one tokenizer's ids, with or without those of special tokens. Safe to use from several threads.

    Attributes:
        num_unfinished: replacement marks at the end of a text that may be the beginning of one character.
        lags: whether the text of the last token may change in any way when there is another one behind it.
        num_rewritten: letters at the end of a text that may be the beginning of what the decoder replaces.
        cleans_up: whether spaces before punctuation vanish once that is there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        """`skip_special_tokens`: leave them out of texts, but where `decode` is told otherwise."""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        steps = _decoder_steps(tokenizer)
        kinds = {step["type"] for step in steps or ()}
        self._has_byte_level = "ByteLevel" in kinds
        self._has_byte_pieces = steps is None or "ByteFallback" in kinds
        self._drops_unknown = tokenizer.is_fast
        self._silent = _silent_ids(tokenizer) if skip_special_tokens else frozenset()
        patterns = _joined_patterns(steps or ())
        self.lags = steps is None or not kinds <= LOCAL_STEPS or None in patterns
        self.num_rewritten = sum(len(pattern) - 1 for pattern in patterns if pattern)
        # Several marks may become one character where a decoder writes a mark for each byte.
        self.num_unfinished = 3 if self.lags else int(self._has_byte_level)
        self.cleans_up = _cleans_up(tokenizer)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """The tokenizer's own text of ids. Raises what the tokenizer raises for ids that it does not know."""
        skips = self._skips if skip_special_tokens is None else skip_special_tokens
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=skips)
        assert isinstance(text, str)
        return text

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """The same before it is cleaned up."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def clean_up(self, raw: str) -> str:
        """What `decode` makes of raw text."""
        return self._tokenizer.clean_up_tokenization(raw) if self.cleans_up else raw

    def is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out: it is special, or nothing at all to a tokenizer that allows that."""
        if token_id in self._silent:
            return True
        return self._drops_unknown and self._tokenizer.convert_ids_to_tokens(token_id) is None

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a token such as <0x0A> stands for. A run of these is decoded at once, valid or not at all."""
        if not self._has_byte_pieces:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        found = _BYTE.fullmatch(piece) if isinstance(piece, str) else None
        return None if found is None else int(found[1], 16)

    def behind(self, token_ids: Iterable[int]) -> str:
        """The text of ids behind other text, special tokens included: with the space that starts of texts lose."""
        anchor, before = self._anchor
        text = self.decode([*anchor, *token_ids], skip_special_tokens=False)
        return text[len(before) :] if text.startswith(before) else text

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text in UTF-8, also where it is a part of a character only."""
        byte = self.byte_of(token_id)
        if byte is not None:
            return bytes([byte])
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._has_byte_level and isinstance(piece, str) and all(letter in _byte_letters() for letter in piece):
            return bytes(_byte_letters()[letter] for letter in piece)
        return self.behind([token_id]).encode("utf-8", "replace")

    @cached_property
    def _anchor(self) -> tuple[tuple[int, ...], str]:
        for text in ANCHORS:
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
            if ids and self.decode(ids, skip_special_tokens=False).strip() == text:
                return ids, self.decode(ids, skip_special_tokens=False)
        return (), ""


def _silent_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    is_forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return not tokenizer.is_fast or is_forced or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _decoder_steps(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]] | None:
    """The steps of a fast tokenizer's decoder in order; None where nobody can tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        return None
    if backend.decoder is None:
        return []
    try:
        return _flat(json.loads(backend.decoder.__getstate__()))
    except Exception:  # a decoder written in Python has no description, and says so with a bare Exception
        return None


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for each in step["decoders"] for inner in _flat(each)]


def _joined_patterns(steps: Iterable[dict[str, Any]]) -> list[str | None]:
    """What is replaced in text that was joined before, and so may lie across tokens; None for a regular expression."""
    is_joined, patterns = False, list[str | None]()
    for step in steps:
        is_joined = is_joined or step["type"] == "Fuse"
        if step["type"] == "Replace" and is_joined:
            patterns.append(step["pattern"].get("String"))
    return patterns


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
