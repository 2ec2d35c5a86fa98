"""From generated tokens to text, as they come.

Text is only given out once it cannot change any more: not while it ends inside a multi-byte character, and not while
its end could still become a stop string. Decoding looks at a short window of recent tokens, so that a long answer
costs linear time.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MAX_UNFINISHED_BYTES = 4
"""A character of UTF-8 has at most four bytes; a replacement mark older than that is really in the text."""


class Detokenizer:
    """The text of one growing answer.

    Attributes:
        text: what has been given out so far.
        stopped: the stop string that ended the answer, once one did.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._text_ends: list[int] = []  # length of all text known after each token
        self._window_start = 0
        self._window_done = 0
        self._known = ""  # decoded and stable, given out or held back
        self.text = ""
        self.stopped: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become final with it (may be empty)."""
        self._token_ids.append(token_id)
        self._known += self._newly_decoded(flush=False)
        self._text_ends.append(len(self._known))
        return self._release(hold_back=True)

    def finish(self) -> str:
        """No more tokens: returns the text that was still held back."""
        if self.stopped is None:
            self._known += self._newly_decoded(flush=True)
        return self._release(hold_back=False)

    @property
    def num_kept_tokens(self) -> int:
        """Leading tokens that belong to the answer: all of them, or those that end before the stop string."""
        if self.stopped is None:
            return len(self._token_ids)
        return sum(end <= len(self.text) for end in self._text_ends)

    def _newly_decoded(self, *, flush: bool) -> str:
        before = self._decode(self._window_start, self._window_done)
        now = self._decode(self._window_start, len(self._token_ids))
        unfinished = now.endswith(REPLACEMENT) and len(self._token_ids) - self._window_done < MAX_UNFINISHED_BYTES
        if len(now) <= len(before) or (unfinished and not flush):
            return now[len(before) :] if flush else ""
        self._window_start, self._window_done = self._window_done, len(self._token_ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        text = self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _release(self, *, hold_back: bool) -> str:
        if self.stopped is not None:
            return ""
        searched_from = len(self.text)
        found = [(self._known.find(stop, searched_from), stop) for stop in self._stop]
        # The one that is complete first, as if the text had come letter by letter.
        hits = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if hits:
            _, end, self.stopped = min(hits)
        else:
            end = len(self._known) - (self._num_held_back() if hold_back else 0)
        released = self._known[searched_from:end]
        self.text += released
        return released

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        tail = self._known[len(self.text) :]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(tail)), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0
