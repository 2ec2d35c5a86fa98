"""Calls as JSON objects between tags, as Hermes and Qwen write them: `<tool_call>{...}</tool_call>`."""

from __future__ import annotations

from kvcomm.toolcalls.json_call import JsonCall
from kvcomm.toolcalls.stepping import JsonCallParser
from kvcomm.toolcalls.writer import AnswerWriter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
STRAY = "}] \t\r\n"
"""What models write too much of behind an object."""


class TaggedParser(JsonCallParser):
    """What stands between the tags and is no call stays text, tags included."""

    def __init__(self, writer: AnswerWriter) -> None:
        super().__init__(writer, "text")

    def _step(self) -> bool:
        steps = {"text": self._text, "body": self._body, "object": self._object, "after": self._after}
        return steps[self._state]()

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

    def _behind_object(self) -> str:
        return "after" if self._call.is_call else "text"

    def _after(self) -> bool:
        behind = self._buffer.lstrip(STRAY)
        if CLOSE.startswith(behind[: len(CLOSE)]) and len(behind) < len(CLOSE):
            return False
        if behind.startswith(CLOSE):
            self._buffer = behind[len(CLOSE) :]
        self._state = "text"
        return True
