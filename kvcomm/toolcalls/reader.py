"""From the text of one answer to its events: what was thought, what is said, what is called.

Reasoning stands between tags in front of an answer; a prompt may have opened the tag already. All else goes through the
parser of the model's format, or is text where there are no tools.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvcomm.toolcalls.events import Answer, Event, Finish, FinishReason, collected
from kvcomm.toolcalls.writer import AnswerWriter, CallParser, may_become, num_held


class ReasoningTags(NamedTuple):
    """What a model writes around what it thinks."""

    open: str
    close: str


class PlainParser:
    """An answer without calls."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer

    def feed(self, text: str) -> None:
        """See `CallParser`."""
        self._writer.text(text)

    def finish(self) -> None:
        """See `CallParser`."""


class AnswerReader:
    """Reads one growing answer; the events do not depend on how it is cut."""

    def __init__(
        self,
        writer: AnswerWriter,
        parser: CallParser,
        *,
        tags: ReasoningTags | None = None,
        is_reasoning: bool = False,
    ) -> None:
        """`is_reasoning`: the prompt ends in open tags, so that the answer begins between them."""
        self._writer = writer
        self._parser = parser
        self._tags = tags
        self._buffer = ""
        self._state: Literal["start", "reasoning", "answer"] = "start" if tags is not None else "answer"
        if tags is not None and is_reasoning:
            self._state = "reasoning"

    def read(self, text: str) -> list[Event]:
        """The events that more text brings."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._writer.take()

    def finish(self, reason: str) -> list[Event]:
        """The answer has ended, for the engine's reason; returns the last events."""
        self._writer.is_cut = reason != "stop"
        if self._state == "reasoning":
            self._writer.reasoning(self._buffer)
        else:
            self._parser.feed(self._buffer)
        self._parser.finish()
        self._writer.close()
        return [*self._writer.take(), Finish(self._reason(reason))]

    def whole(self, text: str, reason: str) -> Answer:
        """A whole answer at once; nothing else may have been read."""
        return collected([*self.read(text), *self.finish(reason)])

    def _reason(self, reason: str) -> FinishReason:
        if reason != "stop":
            return "length"
        return "tool_calls" if self._writer.num_calls else "stop"

    def _step(self) -> bool:
        if self._state == "answer":
            self._parser.feed(self._buffer)
            self._buffer = ""
            return False
        assert self._tags is not None
        return self._start(self._tags) if self._state == "start" else self._reasoning(self._tags)

    def _start(self, tags: ReasoningTags) -> bool:
        found = self._buffer.lstrip()
        if found.startswith(tags.open):
            self._buffer, self._state = found[len(tags.open) :], "reasoning"
            return True
        if not found or may_become(found, [tags.open]):
            return False
        self._state = "answer"
        return True

    def _reasoning(self, tags: ReasoningTags) -> bool:
        text, tag, rest = self._buffer.partition(tags.close)
        if tag:
            self._writer.reasoning(text)
            self._writer.end_reasoning()
            self._buffer, self._state = rest, "answer"
            return True
        end = len(text) - num_held(text, tags.close)
        self._writer.reasoning(text[:end])
        self._buffer = text[end:]
        return False
