"""Calls as JSON objects without any mark, as Llama 3 writes them: an answer is `{"name": ..., "parameters": ...}`.

Several have a semicolon or a line between them. Other objects are text: only where a tool of the request has the name
is it a call, unless the token that Llama puts before calls has said so.
"""

from __future__ import annotations

from kvcomm.toolcalls.json_call import JsonCall
from kvcomm.toolcalls.stepping import JsonCallParser
from kvcomm.toolcalls.writer import AnswerWriter, may_become

MARK = "<|python_tag|>"
BETWEEN = "; \t\r\n"


class PlainJsonParser(JsonCallParser):
    """Looks at the beginning of an answer, and behind the mark."""

    def __init__(self, writer: AnswerWriter, names: frozenset[str]) -> None:
        super().__init__(writer, "start")
        self._names = names

    def _step(self) -> bool:
        if self._state == "start":
            return self._start()
        return self._object() if self._state == "object" else self._text()

    def _start(self) -> bool:
        found = self._buffer.lstrip(BETWEEN if self._writer.num_calls else None)
        self._before += self._buffer[: len(self._buffer) - len(found)]
        self._buffer = found
        if found.startswith("{"):
            is_marked = MARK in self._before
            self._state, self._call = "object", JsonCall(self._writer, None if is_marked else self._names)
        elif found.startswith(MARK):
            self._before, self._buffer = self._before + MARK, found[len(MARK) :]
        elif not found or may_become(found, [MARK]):
            return False
        else:
            self._writer.text(self._before)
            self._state, self._before = "text", ""
        return True

    def _behind_object(self) -> str:
        return "start" if self._call.is_call else "text"

    def _text(self) -> bool:
        has_mark, self._buffer = self._writer.text_before(self._buffer, MARK)
        if has_mark:
            self._state, self._buffer = "start", MARK + self._buffer
        return has_mark
