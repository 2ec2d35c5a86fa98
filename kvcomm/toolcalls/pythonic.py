"""Calls as a list in Python's syntax, as Llama 4 and others write them: `[search(query="cats", top=3), today()]`.

Only literals are arguments; nothing is ever evaluated. What is no literal is passed on as a string.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kvcomm.toolcalls.stepping import SteppingParser
from kvcomm.toolcalls.writer import AnswerWriter, encodable, may_become

START, END = "<|python_start|>", "<|python_end|>"
_CALL = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(")
_CALL_SO_FAR = re.compile(r"\s*(?:[A-Za-z_][\w.-]*\s*)?")
_KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)")
_BAD_ESCAPE = re.compile(r"\\(?:([\\'\"abfnrtvxuUN\n0])|)", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser(SteppingParser):
    """Looks at the beginning of an answer; a list that calls no tool of the request is text."""

    def __init__(self, writer: AnswerWriter, names: Mapping[str, Sequence[str]]) -> None:
        """`names`: of the tools, and of their parameters in order."""
        super().__init__(writer)
        self._names = names
        self._state: Literal["start", "call", "arguments", "between", "end", "text"] = "start"
        self._is_marked = False
        self._call = _Arguments(())

    def finish(self) -> None:
        """See `CallParser`."""
        if self._state == "arguments":
            self._writer.end_call()
        elif not (self._state == "end" and may_become(self._buffer, [END])):
            self._writer.text(self._before + self._buffer)
        self._buffer = self._before = ""

    def _step(self) -> bool:
        steps = {
            "start": self._start,
            "call": self._begin,
            "arguments": self._arguments,
            "between": self._between,
            "end": self._end,
            "text": self._text,
        }
        return steps[self._state]()

    def _start(self) -> bool:
        self._skip_space()
        if self._buffer.startswith("["):
            self._state = "call"
            self._skip(1)
        elif self._buffer.startswith(START):
            self._is_marked = True
            self._skip(len(START))
        elif not self._buffer or may_become(self._buffer, [START]):
            return False
        else:
            self._give_up()
        return True

    def _begin(self) -> bool:
        found = _CALL.match(self._buffer)
        if self._writer.num_calls and self._buffer.lstrip().startswith("]"):  # behind a last comma
            self._state = "between"
            return True
        if found is None:
            if _CALL_SO_FAR.fullmatch(self._buffer):
                return False
            self._give_up()
            return True
        name = found[1]
        if not self._is_marked and name not in self._names:
            self._give_up()
            return True
        self._writer.begin_call(name)
        self._call = _Arguments(self._names.get(name, ()))
        self._buffer, self._before, self._state = self._buffer[found.end() :], "", "arguments"
        return True

    def _arguments(self) -> bool:
        for at, letter in enumerate(self._buffer):
            self._writer.arguments(self._call.take(letter))
            if self._call.is_over:
                self._writer.end_call()
                self._buffer, self._state = self._buffer[at + 1 :], "between"
                return True
        self._buffer = ""
        return False

    def _between(self) -> bool:
        self._skip_space()
        if not self._buffer:
            return False
        self._state = {",": "call", "]": "end"}.get(self._buffer[0], "text")  # type: ignore[assignment]  # as it is
        if self._state != "text":
            self._skip(1)
        self._before = ""
        return True

    def _end(self) -> bool:
        behind = self._buffer.lstrip()
        if not behind or may_become(behind, [END]):
            return False
        self._buffer, self._state = behind.removeprefix(END) if behind.startswith(END) else self._buffer, "text"
        return True

    def _text(self) -> bool:
        self._writer.text(self._buffer)
        self._buffer = ""
        return False

    def _give_up(self) -> None:
        self._writer.text(self._before)
        self._before, self._state = "", "text"

    def _skip(self, num_letters: int) -> None:
        self._before += self._buffer[:num_letters]
        self._buffer = self._buffer[num_letters:]

    def _skip_space(self) -> None:
        self._skip(len(self._buffer) - len(self._buffer.lstrip()))


def written(arguments: Mapping[str, Any]) -> str:
    """Arguments as a call has them."""
    return ", ".join(f"{name}={_python(value)}" for name, value in arguments.items())


def _python(value: Any) -> str:
    return _json(value) if isinstance(value, str) else repr(value)


class _Arguments:
    """The arguments of one call, letter by letter; each becomes JSON once all of it is there."""

    def __init__(self, parameters: Sequence[str]) -> None:
        self._parameters = parameters
        self._argument: list[str] = []
        self._depth = 0
        self._quote = ""
        self._is_escaped = False
        self._num_written = 0
        self.is_over = False

    def take(self, letter: str) -> str:
        """The next letter behind the opening bracket; returns JSON text that is complete with it."""
        if self._quote:
            self._argument.append(letter)
            if self._is_escaped or letter != self._quote:
                self._is_escaped = letter == "\\" and not self._is_escaped
            else:
                self._quote = ""
            return ""
        if self._depth == 0 and letter in ",)":
            written = self._write()
            self.is_over = letter == ")"
            return written + ("}" if self._num_written else "{}") if self.is_over else written
        self._quote = letter if letter in "'\"" else ""
        self._depth = max(0, self._depth + (letter in "([{") - (letter in ")]}"))
        self._argument.append(letter)
        return ""

    def _write(self) -> str:
        argument, self._argument = "".join(self._argument), []
        if not argument.strip():
            return ""
        keyword = _KEYWORD.match(argument)
        at = self._num_written
        if keyword is not None:
            name, value = keyword[1], argument[keyword.end() :]
        else:
            name, value = self._parameters[at] if at < len(self._parameters) else f"argument_{at}", argument
        self._num_written += 1
        return f"{', ' if at else '{'}{_json(name)}: {_literal(value.strip())}"


def _literal(text: str) -> str:
    """A literal of Python or JSON as JSON text; what is none as a string."""
    try:
        parsed = ast.parse(_BAD_ESCAPE.sub(lambda found: found[0] if found[1] else "\\\\", text), mode="eval")
        return _json(ast.literal_eval(_JsonNames().visit(parsed)))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _json(text)


class _JsonNames(ast.NodeTransformer):
    """JSON's names for what Python calls True, False and None."""

    def visit_Name(self, node: ast.Name) -> ast.expr:  # ast calls it by this name
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _json(value: Any) -> str:
    """JSON text of a value; halves of characters are replaced."""
    return encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
