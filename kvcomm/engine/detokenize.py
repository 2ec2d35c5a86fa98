"""From generated tokens to text and ids, as they come.

All chunks of an answer joined are the tokenizer's own text of its ids. So a piece of text is only given out once it
cannot change any more: not while it ends inside a character, and not while its end could still become a stop string;
an id once no stop string can cut it. Decoding looks at a short window of recent tokens, so that a long answer costs
linear time.

A stop string may begin or end inside a token. Then the answer's ids are the drawn ones wholly before it, and behind
them the tokens that the rest of the text has when it is tokenized: who reads the ids reads what the answer shows.

Where a drawn token begins in the text is known once the text before it is out: a token that goes on with a character
begins where the character does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvcomm.engine.byte_runs import ByteRun
from kvcomm.engine.token_texts import REPLACEMENT, TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_RECENT = 256
"""Letters kept of what was given out, to compare the ends of tokens with."""

NUM_CONTEXT = 8
"""Tokens before a token that its text can depend on; runs of byte tokens count as one."""

_UNCLEANED = re.compile(r".*[^ .?!,'ntmsver]", re.DOTALL)
"""Text up to its last letter that cleaning up never looks at, so that what follows changes nothing before it."""


class _End(NamedTuple):
    """Where the text of the first `num_tokens` ids ended when the last of them came.

    Attributes:
        position: letters before it.
        tail: the last of these letters, which could still change then.
        is_silent: the last of the ids has no text.
        is_whole: what is before it can stand alone, if its text stays as it was; not so inside a run of bytes.
        limit: letters that these ids can own at most: a later token may have taken some of theirs away.
    """

    num_tokens: int
    position: int
    limit: int
    tail: str = ""
    is_silent: bool = False
    is_whole: bool = True


class Detokenizer:
    """The text and the ids of one growing answer.

    Attributes:
        stopped: the stop string that ended the answer, once one did.
        num_kept_tokens: leading drawn tokens that belong to the answer: all of them, or those before the stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        texts: TokenTexts | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
        min_tokens: int = 0,
    ) -> None:
        """Make one.

        Args:
            texts: of the tokenizer, where they are known already.
            encode: tokenizes what a stop string leaves of a token, as the middle of a text; None: the ids lack it.
            min_tokens: tokens in whose text no stop string is looked for.
        """
        self._texts = texts or TokenTexts(tokenizer)
        self._encode = encode
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._window = TextWindow(self._texts, keep_run=max(map(len, self._stop), default=0))
        self._pieces: list[str] = []  # given out
        self._num_released = 0  # letters given out
        self._recent = ""
        self._held = ""  # cannot change any more, but might become a stop string
        self._ends: deque[_End] = deque()
        self._num_ended = 0  # tokens that have an end
        self._run_start = 0
        self._starts = [0]  # of tokens; the last one may still have to come
        self._num_taken = 0
        self._num_closed = 0
        self._closed_at = 0
        self._answer: tuple[int, ...] | None = None
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """What has been given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_kept_tokens(self) -> int:
        return len(self._token_ids) if self.stopped is None else self._num_closed

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The drawn tokens that the answer keeps, and those of what a stop string left of one; as it is so far."""
        return tuple(self._token_ids) if self._answer is None else self._answer

    @property
    def num_placed(self) -> int:
        """Leading drawn tokens of which it is known where in the answer they begin; at the end all that are in it.

        These are the kept ones, and those of which a stop string has left something.
        """
        num_known = min(len(self._starts), len(self._token_ids))
        if not self._stop or (self._answer is not None and self.stopped is None):
            return num_known
        num_shown = bisect_left(self._starts, self._num_released, hi=num_known)
        return min(num_known, max(self._num_closed, num_shown))

    def starts(self, first: int, end: int) -> tuple[int, ...]:
        """Letters of the answer's text before that of each of the drawn tokens [first, end), which must be placed."""
        return tuple(self._starts[first:end])

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become final with it (may be empty).

        Raises:
            Exception: what the tokenizer raises for an id that it does not know.
        """
        self._token_ids.append(token_id)
        if not self._window.is_in_run:
            self._run_start = self._num_released + len(self._held) + len(self._window.tail)
        self._held += self._window.push(token_id)
        self._end_run()
        if not self._window.is_in_run:
            tail = self._window.tail
            position = self._num_released + len(self._held) + len(tail)
            self._end(position, tail, is_silent=self._texts.is_silent(token_id))
        return self._release(self._window.readable_tail(self._held, self._sought), hold_back=True)

    def finish(self) -> str:
        """No more tokens: returns the text that was still held back."""
        if self._answer is not None:
            return ""
        released = ""
        if self.stopped is None:
            self._held += self._window.flush()
            self._end_run()
            released = self._release("", hold_back=False)
        else:
            self._window.end_run()
            self._end_run()
        while self._ends:
            self._place(self._ends.popleft(), self.text, 0)
        self._answer = self._make_answer()
        return released

    @property
    def _sought(self) -> tuple[str, ...]:
        """The stop strings that the text may end with now."""
        return self._stop if len(self._token_ids) > self._min_tokens else ()

    def take_ids(self) -> tuple[int, ...]:
        """Ids that no stop string can cut any more and that were not taken before."""
        ids = self.answer_ids if self._answer is not None or not self._stop else self._token_ids[: self._num_closed]
        taken, self._num_taken = tuple(ids[self._num_taken :]), len(ids)
        return taken

    def _release(self, tail: str, *, hold_back: bool) -> str:
        """Give out what is final; `tail` may still change, but ends the answer if there is a stop string in it."""
        if self.stopped is not None:
            return ""
        looked_at = self._held + tail
        found = [(looked_at.find(stop), stop) for stop in self._sought]
        # The one that is complete first, as if the text had come letter by letter.
        hits = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if hits:
            _, end, self.stopped = min(hits)
            released, self._held = looked_at[:end], ""
        else:
            end = len(self._held) - (self._num_held_back() if hold_back else 0)
            released, self._held = self._held[:end], self._held[end:]
        self._close_ids(released)
        self._pieces.append(released)
        return released

    def _end(self, position: int, tail: str = "", *, is_silent: bool = False, is_whole: bool = True) -> None:
        self._num_ended += 1
        for at in range(len(self._ends) - 1, -1, -1):  # limits never fall from one end to the next
            if self._ends[at].limit <= position:
                break
            self._ends[at] = self._ends[at]._replace(limit=position)
        self._ends.append(_End(self._num_ended, position, position, tail, is_silent, is_whole))

    def _end_run(self) -> None:
        """Note where the tokens of a run of bytes end, if one has just ended."""
        for num_letters in self._window.take_run():
            self._end(self._run_start + num_letters, is_whole=False)

    def _close_ids(self, released: str) -> None:
        """See which ids have all their text out with `released`."""
        start = self._num_released - len(self._recent)
        out = self._recent + released
        self._num_released += len(released)
        while self._ends and self._ends[0].position <= self._num_released:
            end = self._ends.popleft()
            # A character that the next token completed belongs to both, so its first token cannot stand alone.
            if self._place(end, out, start) == end.position and end.is_whole:
                self._num_closed, self._closed_at = end.num_tokens, end.position
        self._recent = out[-NUM_RECENT:]

    def _place(self, end: _End, out: str, start: int) -> int:
        """Note where the token behind an end begins; returns how far the text is still what it was then.

        Args:
            out: the answer's text behind its first `start` letters.
        """
        base = max(end.position - len(end.tail), start)
        tail = end.tail[base - end.position :] if base < end.position else ""
        begin = place = base + num_common(tail, out[base - start : base - start + len(tail)])
        if self._ends and end.tail.endswith(REPLACEMENT) and place == self._ends[0].position:
            begin -= not self._ends[0].is_silent  # the same mark stands for both
        self._starts.append(max(min(begin, end.limit), self._starts[-1]))
        return place

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._sought), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._sought):
                return length
        return 0

    def _make_answer(self) -> tuple[int, ...]:
        if self.stopped is None:
            return tuple(self._token_ids)
        kept = self._token_ids[: self._num_closed]
        rest = self.text[self._closed_at :]
        if not rest or self._encode is None:
            return tuple(kept)
        candidates = [rest]
        if not self._closed_at:
            # The text of an answer may lack the space that its first token has behind a prompt.
            behind = self._texts.behind(token for token in self._token_ids if not self._texts.is_silent(token))
            if behind.startswith(" " + rest):
                candidates.insert(0, " " + rest)
        answers = [(*kept, *self._encode(candidate)) for candidate in candidates]
        exact = (answer for answer in answers if self._texts.decode(answer) == self.text)
        return next(exact, answers[-1])


class TextWindow:
    """Recent tokens of an answer, and how much of their text is settled: the same whatever follows.

    Attributes:
        tail: text behind the settled one that may still change.
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
        self._keep_run = keep_run
        self._run: ByteRun | None = None
        self._run_ends: list[int] = []
        self.tail = ""

    @property
    def is_in_run(self) -> bool:
        """Whether the last token stands for a byte, so that nothing is known about its text yet."""
        return self._run is not None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is settled with it."""
        if self._texts.is_silent(token_id):
            if self._run is not None:
                self._run.skip()
            return ""
        byte = self._texts.byte_of(token_id)
        if byte is None:
            self.end_run()
        self._token_ids.append(token_id)
        self._is_byte.append(byte is not None)
        if byte is not None:
            if self._run is None:
                self._run = ByteRun(self._keep_run)
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
        if self._run is not None:
            now = self._texts.decode_raw(self._token_ids)
            self._run_ends = self._run.ends(now[num_common(self._before, now) :])
            self._run = None

    def take_run(self) -> list[int]:
        """Letters of the text of a run that has ended, up to the end of each of its tokens; once."""
        ends, self._run_ends = self._run_ends, []
        return ends

    def readable_tail(self, held: str, stop: Sequence[str]) -> str:
        """What the answer would show behind the settled text if it ended now, where a stop string may be in it."""
        if not stop:
            return ""
        if self._run is None:
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
