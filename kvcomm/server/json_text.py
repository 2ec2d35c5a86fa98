"""JSON that strangers send: measured before anything is built of it, then read.

Building is what costs: a body of a few megabytes can become gigabytes of objects, and Python's reader lets no other
thread run meanwhile. So containers, members, values, levels and digits are counted first, in windows, on the bytes;
what exceeds a cap is refused at that place, and never built. Names that come twice, NaN, and halves of characters are
refused too: readers differ in what they make of them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

WINDOW = 65_536
"""Bytes that are looked at in one go; other threads may run in between."""

MAX_NAME = 64
"""Letters of a member's name in a message."""

OUTSIDE = re.compile(rb'(?:[^"]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"]*+', re.DOTALL)
"""Up to a string that does not end in the window."""

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
NOT_OF_NUMBERS = re.compile(rb"[^0-9.eE+-]+")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
OPENING = b"[{"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}:]', re.DOTALL)


class JsonCaps(NamedTuple):
    """How much a text may hold at most.

    Attributes:
        depth: levels of nesting.
        containers: arrays and objects.
        members: of all objects together.
        values: items and members of everything, containers included.
        digits: of one number, with its sign, point and exponent.
    """

    depth: int = 64
    containers: int = 65_536
    members: int = 65_536
    values: int = 262_144
    digits: int = 1000

    def for_context(self, max_context: int) -> JsonCaps:
        """The same, with room for token ids of two prompts of the model's limit."""
        return self._replace(values=max(self.values, 2 * max_context))


class JsonRefused(ValueError):
    """A text that is no JSON, or more of it than is taken.

    Attributes:
        is_json: whether another reader might take it.
        param: the member of the outermost object in which it lies, where one is.
    """

    def __init__(self, message: str, *, is_json: bool = True, param: str | None = None) -> None:
        super().__init__(message)
        self.is_json = is_json
        self.param = param


def read_json(text: bytes, caps: JsonCaps) -> Any:
    """The value of a text in UTF-8.

    Raises:
        JsonRefused: it is no JSON, it exceeds a cap, a name comes twice, a number is none, or a string is no text.
    """
    _require_measure(text, caps)
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonRefused(f"byte {error.start} is not UTF-8", is_json=False) from None
    try:
        value = json.loads(decoded, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise JsonRefused(error.msg, is_json=False) from None
    if SURROGATE.search(text):
        _require_characters(value)
    return value


def _require_measure(text: bytes, caps: JsonCaps) -> None:
    """Raises JsonRefused where a text exceeds a cap; what is no JSON may pass."""
    num_containers = num_members = num_values = depth = at = 0
    while at < len(text):
        end = OUTSIDE.match(text, at, min(at + WINDOW, len(text))).end()  # type: ignore[union-attr]  # it may be empty
        plain = STRING.sub(b"", text[at:end])
        brackets = plain.translate(None, NOT_BRACKETS)
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        num_containers += num_opened
        num_members += plain.count(b":")
        num_values += plain.count(b",") + num_opened
        if num_containers > caps.containers:
            _refuse(f"more than {caps.containers} arrays and objects", text, end)
        if num_members > caps.members:
            _refuse(f"more than {caps.members} members of objects", text, end)
        if num_values > caps.values:
            _refuse(f"more than {caps.values} values", text, end)
        for bracket in brackets:
            depth += 1 if bracket in OPENING else -1
            if depth > caps.depth:
                _refuse(f"more than {caps.depth} levels: it is nested too deep", text, end)
        if len(plain) > caps.digits and max(map(len, NOT_OF_NUMBERS.split(plain))) > caps.digits:
            _refuse(f"a number of more than {caps.digits} digits", text, end)
        at = _after_string(text, end)


def _after_string(text: bytes, at: int) -> int:
    """Where to go on: at the end of a window outside of strings, or behind the string that begins there."""
    if text[at : at + 1] != b'"':
        return at
    at += 1
    while at < len(text):
        end = INSIDE.match(text, at, min(at + WINDOW, len(text))).end()  # type: ignore[union-attr]  # it may be empty
        if text[end : end + 1] == b'"':
            return end + 1
        if end == at:  # a last backslash, with nothing behind it
            break
        at = end
    return len(text)


def _refuse(what: str, text: bytes, end: int) -> NoReturn:
    raise JsonRefused(f"it has {what}", param=_member_at(text[:end]))


def _member_at(text: bytes) -> str | None:
    """The member of the outermost object that a beginning of a text ends in."""
    depth, last, name = 0, b"", None
    for found in MARKS.finditer(text):
        mark = found[0]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif depth == 1 and mark == b":":
            name = last
        elif depth == 1:
            last = mark
    if name is None or len(name) > MAX_NAME or b"\\" in name:
        return None
    return name[1:-1].decode(errors="replace")


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) != len(members):
        seen: set[str] = set()
        twice = next(name for name, _ in members if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonRefused(f"an object has the member {twice[:MAX_NAME]!r} twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise JsonRefused(f"{name} is no number of JSON")


def _require_characters(value: Any) -> None:
    """Raises JsonRefused for a string, or name, with half a character in it."""
    level = [value]
    while level:
        for item in level:
            if isinstance(item, str) and not _is_text(item):
                raise JsonRefused("a string has a lone surrogate, which is no character")
        level = [part for item in level for part in _parts(item)]


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
