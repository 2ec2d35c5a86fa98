"""Calls as Mistral writes them: `[TOOL_CALLS] [{"name": ..., "arguments": ...}]` or `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import re

from kvcomm.toolcalls.json_call import JsonCall, JsonValue
from kvcomm.toolcalls.stepping import JsonCallParser
from kvcomm.toolcalls.writer import AnswerWriter

MARK = "[TOOL_CALLS]"
MAX_HEAD = 256
"""Letters between the mark and the arguments of a call with a name in front."""

_HEAD = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\]\s*)?")
_HEAD_SO_FAR = re.compile(r"[\w.-]*\s*(?:\[[A-Z_]*\]?\s*[\w-]*\s*)*")


class MistralParser(JsonCallParser):
    """Reads both forms. What stands behind the mark and is no call stays text, the mark included."""

    def __init__(self, writer: AnswerWriter) -> None:
        super().__init__(writer, "text")
        self._is_list = False
        self._value = JsonValue()

    def _step(self) -> bool:
        steps = {"text": self._text, "body": self._body, "object": self._object, "arguments": self._arguments}
        return steps[self._state]()

    def _text(self) -> bool:
        has_mark, self._buffer = self._writer.text_before(self._buffer, MARK)
        if has_mark:
            self._before, self._state, self._is_list = MARK, "body", False
        return has_mark

    def _body(self) -> bool:
        """Behind the mark, or between the objects of a list."""
        found = self._buffer.lstrip(" \t\r\n," if self._is_list else None)
        self._skip(len(self._buffer) - len(found))
        if not found:
            return False
        if found[0] == "{":
            self._state, self._call = "object", JsonCall(self._writer)
        elif self._is_list and found[0] == "]":
            self._buffer, self._state, self._before = found[1:], "text", ""
        elif not self._is_list and found.startswith("["):
            self._is_list = True
            self._skip(1)
        elif self._is_list or not self._begin_named():
            if not self._is_list and self._may_be_named():
                return False
            self._writer.text(self._before)
            self._state, self._before = "text", ""
        return True

    def _begin_named(self) -> bool:
        head, brace, _ = self._buffer[:MAX_HEAD].partition("{")
        named = _HEAD.fullmatch(head) if brace else None
        if named is None:
            return False
        self._writer.begin_call(named[1])
        self._buffer = self._buffer[len(head) :]
        self._state, self._before, self._value = "arguments", "", JsonValue()
        return True

    def _may_be_named(self) -> bool:
        is_short = len(self._buffer) < MAX_HEAD
        return is_short and "{" not in self._buffer and _HEAD_SO_FAR.fullmatch(self._buffer) is not None

    def _behind_object(self) -> str:
        return "body" if self._is_list else "text"

    def _arguments(self) -> bool:
        end = self._value.end_in(self._buffer)
        self._writer.arguments(self._buffer[:end])
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._writer.end_call()
        self._state = "text"
        return True

    def _skip(self, num_letters: int) -> None:
        skipped, self._buffer = self._buffer[:num_letters], self._buffer[num_letters:]
        if self._before:
            self._before += skipped
