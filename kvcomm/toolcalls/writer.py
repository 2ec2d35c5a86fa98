"""Where parsers put what they find: events in order, calls with ids, white space where it belongs.

White space between texts and calls is there for the format's sake: it is held back until text follows, and left out
where only calls do. An answer without calls keeps all of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcomm.toolcalls.events import ArgumentsDelta, CallEnd, CallStart, Event, ReasoningDelta, TextDelta

NUM_ID_BYTES = 12

NewId = Callable[[], str]


def new_id() -> str:
    """An id for a call, such as OpenAI's."""
    return f"call_{secrets.token_hex(NUM_ID_BYTES)}"


class AnswerWriter:
    """The events of one growing answer.

    Attributes:
        num_calls: begun so far.
        is_cut: the answer ends at a limit, and not by itself.
    """

    def __init__(self, new_id: NewId = new_id, *, holds_space: bool = True) -> None:
        """`holds_space`: False where no calls can come, so that text never waits."""
        self._new_id = new_id
        self._holds_space = holds_space
        self._events: list[Event] = []
        self._space = ""  # held back
        self._reasoning_space = ""
        self._has_text = False
        self._has_reasoning = False
        self._has_other = False  # calls or reasoning
        self._is_in_call = False
        self.num_calls = 0
        self.is_cut = False

    def take(self) -> list[Event]:
        """The events since the last time."""
        taken, self._events = self._events, []
        return taken

    def text(self, piece: str) -> None:
        """More text; white space at its end may be held back."""
        solid = piece.rstrip() if self._holds_space else piece
        shown = self._space + solid if solid else ""
        if self._has_other and not self._has_text:
            shown = shown.lstrip()
        self._space = piece[len(solid) :] if solid else self._space + piece
        if shown:
            self._events.append(TextDelta(shown))
            self._has_text = True

    def text_before(self, buffer: str, mark: str) -> tuple[bool, str]:
        """The text in front of a mark; says whether the mark is there, and gives what is left.

        That is what stands behind the mark, or the end of the buffer that may be its beginning.
        """
        text, found, rest = buffer.partition(mark)
        end = len(text) if found else len(text) - num_held(text, mark)
        self.text(text[:end])
        return bool(found), rest if found else text[end:]

    def reasoning(self, piece: str) -> None:
        """More reasoning; white space at its ends is left out."""
        self._has_other = True
        solid = piece.rstrip()
        if not solid:
            self._reasoning_space += piece
            return
        shown = self._reasoning_space + solid
        self._events.append(ReasoningDelta(shown if self._has_reasoning else shown.lstrip()))
        self._reasoning_space, self._has_reasoning = piece[len(solid) :], True

    def end_reasoning(self) -> None:
        """What follows is no reasoning; white space before it is left out."""
        self._has_other = True
        self._reasoning_space = ""

    def begin_call(self, name: str) -> None:
        """A call of that tool; a call that is open ends."""
        self.end_call()
        self._events.append(CallStart(self.num_calls, self._new_id(), encodable(name)))
        self.num_calls += 1
        self._has_other = self._is_in_call = True

    def arguments(self, piece: str) -> None:
        """More of the open call's arguments."""
        assert self._is_in_call
        if piece:
            self._events.append(ArgumentsDelta(self.num_calls - 1, piece))

    def end_call(self) -> None:
        """The open call is complete; nothing where there is none."""
        if self._is_in_call:
            self._events.append(CallEnd(self.num_calls - 1))
            self._is_in_call = False

    def close(self) -> None:
        """The answer ends."""
        self.end_call()
        if self._space and not self.num_calls and (self._has_text or not self._has_other):
            self._events.append(TextDelta(self._space))
        self._space = ""


class CallParser(Protocol):
    """Finds calls in an answer's text. What it finds depends on the text alone, never on how it is cut."""

    def feed(self, text: str) -> None:
        """More text."""

    def finish(self) -> None:
        """No more text: what was held back is written."""


def encodable(text: str) -> str:
    """A text that the model spelled in JSON, halves of characters replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def num_held(text: str, marker: str) -> int:
    """Length of the longest end of a text that begins a marker without being one."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def may_become(text: str, markers: Sequence[str]) -> bool:
    """Whether a text is the beginning of a marker, and not yet all of it."""
    return any(len(text) < len(marker) and marker.startswith(text) for marker in markers)
