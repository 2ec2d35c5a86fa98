"""Runs of tokens that stand for a byte each: text only as a whole, if it is UTF-8; see `detokenize`."""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Sequence


class ByteRun:
    """Tokens of an answer that stand for a byte each, one behind the other: one run of them."""

    def __init__(self, keep: int) -> None:
        """`keep`: letters of the end of its text that are looked at for stop strings."""
        self._keep = keep
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._end = ""
        self._is_valid = True
        self._is_at_letter = False
        self._bytes = bytearray()
        self._num_bytes: list[int] = []  # up to the end of each token

    def push(self, byte: int) -> None:
        """Add a token's byte."""
        self._bytes.append(byte)
        self._num_bytes.append(len(self._bytes))
        if not self._is_valid:
            return
        try:
            letter = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._is_valid = False
            return
        self._is_at_letter = bool(letter)
        self._end = (self._end + letter)[-self._keep :] if self._keep else ""

    def skip(self) -> None:
        """A token without text stands in the run."""
        self._num_bytes.append(len(self._bytes))

    def ends(self, text: str) -> list[int]:
        """Letters up to the end of each token of a run that has this text: of letters that are complete there."""
        whole = self._bytes.decode("utf-8", "replace")
        if not whole.endswith(text):  # a run that is no UTF-8 may have a mark for each of its bytes
            return [min(num, len(text)) for num in self._num_bytes]
        num_lost = len(whole) - len(text)  # a text may lack the space that it begins with
        ends = _letter_ends(self._bytes)
        return [max(0, bisect_right(ends, num) - num_lost) for num in self._num_bytes]

    def may_end(self, before: str, stop: Sequence[str]) -> bool:
        """Whether the last byte completed a letter that completes a stop string, behind the text `before`."""
        if not self._is_valid or not self._is_at_letter:
            return False
        end = before[-self._keep :] + self._end
        return any(end.endswith(each) for each in stop)


def _letter_ends(data: bytes | bytearray) -> list[int]:
    """Where in UTF-8 its letters end; each stretch that is none is one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends: list[int] = []
    for at in range(len(data)):
        letters = decoder.decode(data[at : at + 1])
        if letters:
            num_pending = len(decoder.getstate()[0])
            ends += [at] * (len(letters) - 1) + [at + 1 - num_pending]
    return [*ends, len(data)] if decoder.getstate()[0] else ends
