"""JSON that strangers send: measured before anything is built of it, then read.

Building is what costs: a body of a few megabytes can become gigabytes of objects, and Python's reader lets no other
thread run meanwhile. So containers, members, values, levels and digits are counted first, in windows, on the bytes;
what exceeds a cap is refused at that place, and never built. Names that come twice, NaN, and halves of characters are
refused too: readers differ in what they make of them.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

WINDOW = 65_536
"""Bytes that are looked at in one go, two at least; other threads may run in between."""

MAX_NAME = 64
"""Letters of a member's name in a message."""

OUTSIDE = re.compile(rb'(?:[^"]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"]*+', re.DOTALL)
"""Up to a string that does not end in the window."""

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
NOT_OF_NUMBERS = re.compile(rb"[^0-9.eE+-]+")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
OPENING, CLOSING = (b"[", b"{"), (b"]", b"}")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}:,]|[0-9.eE+-]++', re.DOTALL)
OUTERMOST = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}:]', re.DOTALL)


class JsonCaps(NamedTuple):
    """How much a text may hold at most.

    Attributes:
        depth: levels of nesting.
        containers: arrays and objects.
        members: of all objects together.
        values: items and members of everything; an empty container counts as if it had one.
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


class _Counts(NamedTuple):
    """What a beginning of a text holds; `depth` is where it ends."""

    depth: int = 0
    containers: int = 0
    members: int = 0
    values: int = 0


def _require_measure(text: bytes, caps: JsonCaps) -> None:
    """Raises JsonRefused where a text exceeds a cap; what is no JSON may pass."""
    counts, at = _Counts(), 0
    while at < len(text):
        end = OUTSIDE.match(text, at, min(at + WINDOW, len(text))).end()  # type: ignore[union-attr]  # it may be empty
        plain = STRING.sub(b"", text[at:end])
        brackets = plain.translate(None, NOT_BRACKETS)
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        after = _Counts(
            2 * num_opened - len(brackets) + counts.depth,
            counts.containers + num_opened,
            counts.members + plain.count(b":"),
            counts.values + plain.count(b",") + num_opened,
        )
        has_long_number = len(plain) > caps.digits and max(map(len, NOT_OF_NUMBERS.split(plain))) > caps.digits
        is_deep = counts.depth + num_opened > caps.depth and _deepest(counts.depth, brackets) > caps.depth
        if has_long_number or is_deep or _excess(after, caps) is not None:
            _require_marks(text, at, end, counts, caps)
        counts, at = after, _after_string(text, end)


def _deepest(depth: int, brackets: bytes) -> int:
    """The deepest level that brackets lead to."""
    return max(accumulate((1 if bracket in b"[{" else -1 for bracket in brackets), initial=depth))


def _excess(counts: _Counts, caps: JsonCaps) -> str | None:
    """The cap that is exceeded, in words."""
    if counts.depth > caps.depth:
        return f"more than {caps.depth} levels: it is nested too deep"
    if counts.containers > caps.containers:
        return f"more than {caps.containers} arrays and objects"
    if counts.members > caps.members:
        return f"more than {caps.members} members of objects"
    return f"more than {caps.values} values" if counts.values > caps.values else None


def _require_marks(text: bytes, at: int, end: int, counts: _Counts, caps: JsonCaps) -> None:
    """The same for one window, mark by mark; raises JsonRefused at the place where a cap is exceeded."""
    for found in MARKS.finditer(text, at, end):
        mark = found[0]
        opened = mark in OPENING
        counts = _Counts(
            counts.depth + opened - (mark in CLOSING),
            counts.containers + opened,
            counts.members + (mark == b":"),
            counts.values + (mark == b",") + opened,
        )
        is_long = len(mark) > caps.digits and mark[:1] != b'"'
        what = f"a number of more than {caps.digits} digits" if is_long else _excess(counts, caps)
        if what is not None:
            raise JsonRefused(f"it has {what}", param=_member_at(text, found.end()))


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


def _member_at(text: bytes, end: int) -> str | None:
    """The member of the outermost object in which a place of a text lies."""
    depth, last, name = 0, b"", None
    for found in OUTERMOST.finditer(text, 0, end):
        mark = found[0]
        depth += (mark in OPENING) - (mark in CLOSING)
        if depth == 1 and mark == b":":
            name = last
        elif depth == 1 and mark.startswith(b'"'):
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
