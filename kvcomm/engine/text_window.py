"""How much of the text of recent tokens is settled: the same whatever follows; see `detokenize`.

Decoding looks at a short window of tokens, so that a long answer costs linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvcomm.engine.byte_runs import ByteRun
from kvcomm.engine.token_texts import REPLACEMENT, TokenTexts

NUM_CONTEXT = 8
"""Tokens before a token that its text can depend on; runs of byte tokens count as one."""

_UNCLEANED = re.compile(r".*[^ .?!,'ntmsver]", re.DOTALL)
"""Text up to its last letter that cleaning up never looks at, so that what follows changes nothing before it."""


class TextWindow:
    """Recent tokens of an answer, and how much of their text is settled: the same whatever follows.

    Attributes:
        tail: text behind the settled one that may still change.
        is_in_run: the last token stands for a byte, so that nothing is known about its text yet.
    """

    def __init__(self, texts: TokenTexts, *, keep_run: int) -> None:
        """`keep_run`: letters of a run of bytes to be looked at for stop strings."""
        self._texts = texts
        self._token_ids: list[int] = []
        self._is_byte: list[bool] = []
        self._num_settled = 0  # letters of the window's raw text
        self._before = ""  # the window's raw text one token ago
        self._raw_tail = ""
        self._unclean = ""  # raw, and not settled only as far as cleaning up is concerned
        self._run = ByteRun(keep_run)
        self._run_ends: list[int] = []
        self.tail = ""
        self.is_in_run = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is settled with it."""
        if self._texts.is_silent(token_id):
            if self.is_in_run:
                self._run.skip()
            return ""
        byte = self._texts.byte_of(token_id)
        if byte is None:
            self.end_run()
        self._token_ids.append(token_id)
        self._is_byte.append(byte is not None)
        if byte is not None:
            if not self.is_in_run:
                self._run.begin()
            self.is_in_run = True
            self._run.push(byte)
            return ""
        now = self._texts.decode_raw(self._token_ids)
        settled = self._settle(now, max(self._num_settled, self._num_stable(now)))
        self._before = now
        if len(self._token_ids) > 2 * NUM_CONTEXT:
            self._shift(now)
        return settled

    def flush(self) -> str:
        """No more tokens: all text that was not settled."""
        now = self._texts.decode_raw(self._token_ids) if self._token_ids else ""
        self.end_run()
        return self._settle(now, len(now), is_last=True)

    def end_run(self) -> None:
        """The run of bytes, if there is one, goes on no more."""
        if self.is_in_run:
            now = self._texts.decode_raw(self._token_ids)
            self._run_ends = self._run.ends(now[num_common(self._before, now) :])
            self.is_in_run = False

    def take_run(self) -> list[int]:
        """Letters of the text of a run that has ended, up to the end of each of its tokens; once."""
        ends, self._run_ends = self._run_ends, []
        return ends

    def readable_tail(self, held: str, stop: Sequence[str]) -> str:
        """What the answer would show behind the settled text if it ended now, where a stop string may be in it."""
        if not stop:
            return ""
        if not self.is_in_run:
            return self.tail.rstrip(REPLACEMENT)
        # A run of bytes is decoded as a whole, so it only is where its last letter completes a stop string.
        if not self._run.may_end(held + self.tail, stop):
            return ""
        raw = self._texts.decode_raw(self._token_ids)[self._num_settled :]
        return self._texts.clean_up(self._unclean + raw)

    def _settle(self, now: str, end: int, *, is_last: bool = False) -> str:
        settled, self._raw_tail = now[self._num_settled : end], now[end:]
        self._num_settled = end
        if self._texts.cleans_up:
            raw = self._unclean + settled
            untouched = _UNCLEANED.match(raw)
            end = len(raw) if is_last else 0 if untouched is None else untouched.end()
            settled, self._unclean = self._texts.clean_up(raw[:end]), raw[end:]
        self.tail = self._texts.clean_up(self._unclean + self._raw_tail)
        return settled

    def _num_stable(self, now: str) -> int:
        stable = len(now)
        if self._texts.lags:
            stable = num_common(self._before, now)
        stable = max(0, min(stable, len(now) - self._texts.num_rewritten))
        for _ in range(self._texts.num_unfinished):
            if now[:stable].endswith(REPLACEMENT):
                stable -= 1
        return stable

    def _shift(self, now: str) -> None:
        """Forget tokens that what follows does not depend on."""
        start = len(self._token_ids) - NUM_CONTEXT
        while start and self._is_byte[start] and self._is_byte[start - 1]:
            start -= 1
        shorter = self._texts.decode_raw(self._token_ids[start:]) if start else ""
        end = now[-len(self._raw_tail) - 1 :]
        if len(shorter) > len(end) and shorter.endswith(end):
            del self._token_ids[:start], self._is_byte[:start]
            self._num_settled = len(shorter) - len(self._raw_tail)
            self._before = shorter


def num_common(first: str, second: str) -> int:
    """Letters that two texts begin with both."""
    num = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        num += 1
    return num
