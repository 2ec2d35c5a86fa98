"""Files of data as evaluations read them: what cannot be used is refused in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvcomm.errors import InvalidRequest
from kvcomm.lab.files import BadContent, Line, parse_json, read_lines, read_text

Made = TypeVar("Made")


def text_of(file: Path) -> str:
    """A text, unpacked if its name ends in .gz.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    try:
        return read_text(file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file} is {error}") from error


def json_of(file: Path) -> Any:
    """A JSON value. Raises InvalidRequest as `text_of`, and if it is none."""
    try:
        return parse_json(text_of(file))
    except BadContent as error:
        raise InvalidRequest(f"{file} is {error}") from error


def rows_of(file: Path, make: Callable[[Any], Made], needed: str) -> list[Made]:
    """What `make` makes of the JSON value in every line.

    Args:
        make: may raise what a value of another form leads to.
        needed: what a line has to be, for the message.

    Raises:
        InvalidRequest: it cannot be read, or a line is something else; names the line.
    """
    try:
        return [_made(file, line, make, needed) for line in read_lines(file)]
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file}: {error}") from error


def _made(file: Path, line: Line, make: Callable[[Any], Made], needed: str) -> Made:
    try:
        return make(line.value)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InvalidRequest(f"{file}, line {line.number}: needs {needed} ({error!r})") from error
