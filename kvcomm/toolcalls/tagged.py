"""Calls as JSON objects between tags, as Hermes and Qwen write them: `<tool_call>{...}</tool_call>`."""

from __future__ import annotations

from typing import Literal

from kvcomm.toolcalls.json_call import JsonCall
from kvcomm.toolcalls.writer import AnswerWriter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
STRAY = "}] \t\r\n"
"""What models write too much of behind an object."""


class TaggedParser:
    """What stands between the tags and is no call stays text, tags included.

    Of an answer that ends in the beginning of a further call, before its name, this beginning is left out.
    """

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer
        self._buffer = ""
        self._state: Literal["text", "body", "object", "after"] = "text"
        self._before = ""  # the tag and white space behind it
        self._call = JsonCall(writer)

    def feed(self, text: str) -> None:
        """See `CallParser`."""
        self._buffer += text
        while self._step():
            pass

    def finish(self) -> None:
        """See `CallParser`."""
        is_further = self._writer.num_calls > 0
        if self._state == "object":
            self._call.finish()
            if not self._call.is_call and not is_further:
                self._writer.text(self._before + self._call.raw)
        elif self._state == "text" or (self._state == "body" and not is_further):
            self._writer.text(self._before + self._buffer)
        self._buffer = self._before = ""

    def _step(self) -> bool:
        """Read what can be read by now; False: more text is needed."""
        steps = {"text": self._text, "body": self._body, "object": self._object, "after": self._after}
        return bool(self._buffer) and steps[self._state]()

    def _text(self) -> bool:
        has_tag, self._buffer = self._writer.text_before(self._buffer, OPEN)
        if has_tag:
            self._before, self._state = OPEN, "body"
        return has_tag

    def _body(self) -> bool:
        body = self._buffer.lstrip()
        self._before += self._buffer[: len(self._buffer) - len(body)]
        self._buffer = body
        if body.startswith("{"):
            self._state, self._call = "object", JsonCall(self._writer)
        elif body:
            self._writer.text(self._before)
            self._state, self._before = "text", ""
        return bool(body)

    def _object(self) -> bool:
        self._buffer = self._buffer[self._call.feed(self._buffer) :]
        if not self._call.is_over:
            return False
        if self._call.is_call:
            self._state = "after"
        else:
            self._writer.text(self._before + self._call.raw)
            self._state = "text"
        self._before = ""
        return True

    def _after(self) -> bool:
        behind = self._buffer.lstrip(STRAY)
        if CLOSE.startswith(behind[: len(CLOSE)]) and len(behind) < len(CLOSE):
            return False
        if behind.startswith(CLOSE):
            self._buffer = behind[len(CLOSE) :]
        self._state = "text"
        return True
