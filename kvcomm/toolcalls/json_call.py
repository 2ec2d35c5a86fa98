"""Calls as JSON objects, read letter by letter: the arguments are passed on as they come.

Names of members vary among models: "arguments" or "parameters", in any order with "name", the two of them in an object
"function" or not, the arguments as an object or as a string of JSON. Nothing is repaired: what a model writes as
arguments is passed on as it is, and an object that is no call is no call.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal

from kvcomm.toolcalls.writer import AnswerWriter, encodable

ARGUMENTS = ("arguments", "parameters")
NAMES = ("name", "function")
HARMLESS = frozenset({"name", "function", "type", "id"})
"""Members of a call that has no arguments, where nothing but its members says that it is one."""


class JsonValue:
    """Finds the end of an object or array, strings looked at; whether it is valid is not its concern."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = self._is_escaped = False

    def end_in(self, text: str) -> int | None:
        """Where in the next piece of text the value ends; None: not in it."""
        for at, letter in enumerate(text):
            if self._is_in_string:
                self._is_in_string = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter == '"':
                self._is_in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


class JsonCall:
    """One object that may be a call.

    Attributes:
        is_over: all of it is there, or it is no call.
        is_call: a call has begun with it.
    """

    def __init__(self, writer: AnswerWriter, names: Collection[str] | None = None) -> None:
        """`names`: of tools, where only a call of one of them is a call; None: a marker has said that it is one."""
        self._writer = writer
        self._names = names
        self._raw: list[str] = []
        self._depth = 0
        self._base = 1  # where the members are that are looked at
        self._is_in_string = self._is_escaped = False
        self._expects: Literal["name", "colon", "value", "comma"] = "name"
        self._member = ""
        self._members: set[str] = set()
        self._kept: list[str] | None = None  # of the string or value that is being read
        self._name: str | None = None
        self._arguments: list[str] = []  # to be passed on
        self._are_arguments_open = False
        self._has_arguments = False
        self.is_over = False
        self.is_call = False

    @property
    def raw(self) -> str:
        """All of it so far."""
        return "".join(self._raw)

    def feed(self, text: str) -> int:
        """More text, beginning with "{" at first; returns how much of it belongs to the object."""
        for at, letter in enumerate(text):
            self._raw.append(letter)
            self._take(letter)
            if self.is_over:
                self._pass_on()
                return at + 1
        self._pass_on()
        return len(text)

    def finish(self) -> None:
        """The answer ends in it."""
        if self._kept is not None and self._member in ARGUMENTS and self._expects == "value":
            self._end_arguments("".join(self._kept) + '"' * self._is_in_string)
        self._pass_on()
        self._writer.end_call()
        self.is_over = True

    def _take(self, letter: str) -> None:
        if self._is_in_string:
            self._keep(letter)
            if self._is_escaped or letter != '"':
                self._is_escaped = letter == "\\" and not self._is_escaped
            else:
                self._is_in_string = False
                if self._depth == self._base:
                    self._end_string()
        elif letter == '"':
            self._is_in_string = True
            if self._depth == self._base and self._expects in ("name", "value"):
                self._kept = []
            self._keep(letter)
        elif letter in "{[":
            self._open(letter)
        elif letter in "}]":
            self._close(letter)
        elif self._depth > self._base:
            self._keep(letter)
        elif letter == ":" and self._expects == "colon":
            self._expects = "value"
        elif letter == ",":
            self._end_scalar()
            self._expects = "name"
        elif self._expects == "value" and not letter.isspace():
            self._kept = [] if self._kept is None else self._kept
            self._keep(letter)

    def _keep(self, letter: str) -> None:
        if self._are_arguments_open:
            self._arguments.append(letter)
        elif self._kept is not None:
            self._kept.append(letter)

    def _open(self, letter: str) -> None:
        self._depth += 1
        if self._depth == self._base + 1 and self._expects == "value":
            if letter == "{" and self._member == "function" and self._base == 1:
                self._base, self._expects = 2, "name"
                return
            self._kept = None
            self._are_arguments_open = self._member in ARGUMENTS and not self._has_arguments
            self._has_arguments = self._has_arguments or self._are_arguments_open
        self._keep(letter)

    def _close(self, letter: str) -> None:
        if self._depth > self._base:
            self._keep(letter)
            self._depth -= 1
            if self._depth == self._base:
                self._are_arguments_open = False
                self._expects = "comma"
            return
        self._end_scalar()
        self._depth -= 1
        self._expects = "comma"
        if self._base == 2:  # the object "function" is complete
            self._base = 1
            return
        self._end()

    def _end_string(self) -> None:
        kept, self._kept = "".join(self._kept or ()), None
        if self._expects == "name":
            self._member = _text(kept)
            self._members.add(self._member)
            self._expects = "colon"
        elif self._expects == "value":
            self._end_value(kept)

    def _end_scalar(self) -> None:
        if self._expects == "value" and self._kept is not None:
            kept, self._kept = "".join(self._kept), None
            self._end_value(kept)

    def _end_value(self, kept: str) -> None:
        self._expects = "comma"
        if self._member in NAMES and kept.startswith('"') and self._name is None:
            self._name = _text(kept)
            if self._names is not None and self._name not in self._names:
                self.is_over = True
        elif self._member in ARGUMENTS and not self._has_arguments:
            self._end_arguments(kept)

    def _end_arguments(self, kept: str) -> None:
        self._has_arguments = True
        text = _text(kept) if kept.startswith('"') else kept
        self._arguments.append(encodable(text if text.strip() not in ("", "null") else "{}"))

    def _end(self) -> None:
        self.is_over = True
        is_call = self._name is not None and (self._names is None or self._has_arguments or self._members <= HARMLESS)
        if not is_call:
            return
        if not self._has_arguments:
            self._end_arguments("{}")
        self._pass_on()
        self._writer.end_call()

    def _pass_on(self) -> None:
        """Begin the call as soon as it is certain to be one, and pass on what is there of its arguments."""
        if self._name is None or (self._names is not None and self._name not in self._names):
            return
        if not self.is_call and (self._names is None or self._has_arguments):
            self._writer.begin_call(self._name)
            self.is_call = True
        if self.is_call and self._arguments:
            self._writer.arguments("".join(self._arguments))
            self._arguments.clear()


def _text(literal: str) -> str:
    """What a JSON string says; where it is none, what stands between its quotes."""
    try:
        value = json.loads(literal, strict=False)
    except ValueError:
        return literal.removeprefix('"').removesuffix('"')
    return value if isinstance(value, str) else literal
