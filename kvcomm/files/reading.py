"""Reading files that anybody may have put there.

Only regular files are read: a FIFO, socket or device in a file's place is refused instead of waited for, and what is
checked is what was opened, so nothing can be exchanged in between. Whole files are read up to a limit. What cannot be
read is an `OSError`, what cannot be understood a `BadContent`; no parser's own errors, of numbers, nesting or
encodings, get out. Callers put the file's name before either and raise an error of their own.
"""

from __future__ import annotations

import errno
import os
import stat
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile, GzipFile
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import ValidationError, from_json

CONFIG_BYTES = 16 * 2**20
"""Of a file of settings, keys, a team or a profile."""

TEXT_BYTES = 64 * 2**20
"""Of a prompt, or another text that is used as a whole."""

DATA_BYTES = 4 * 2**30
"""Of a data set, a trace or kept answers, unpacked."""

MAX_DEPTH = 64
"""Tables and arrays inside each other in a TOML file."""

BLOCK_BYTES = 2**20
MAX_SHOWN = 300
"""Characters of what is wrong in a message."""

OPEN_DESCRIPTORS = Path("/proc/self/fd")

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class BadContent(ValueError):
    """A file, or a line of it, is not of the kind that it should be; the message says why."""


@contextmanager
def open_regular(file: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file; never waits for one to become readable.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags)
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, str(error), str(file)) from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, _not_regular("a socket or device"), str(file)) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
            raise OSError(errno.EINVAL, _not_regular(kind), str(file))
        stream = os.fdopen(descriptor, "rb", closefd=False)
        with stream:
            yield stream
    finally:
        os.close(descriptor)


def path_of(stream: BufferedReader, file: Path) -> Path:
    """A path by which libraries that open files themselves get the very file that is open, where the system has one."""
    path = OPEN_DESCRIPTORS / str(stream.fileno())
    return path if OPEN_DESCRIPTORS.is_dir() else file


def read_bytes(file: Path, *, max_bytes: int = DATA_BYTES) -> bytes:
    """The whole of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or holds more than `max_bytes`.
    """
    with open_regular(file) as stream:
        return _whole(file, stream, max_bytes)


def read_text(file: Path, *, max_bytes: int = TEXT_BYTES) -> str:
    """The whole of a regular file of UTF-8 text, unpacked if its name ends in .gz; line ends stay as they are.

    Raises:
        OSError: as `read_bytes`; also for more than `max_bytes` of unpacked text.
        BadContent: it is not UTF-8, or not gzip.
    """
    return decoded(unpacked(file, read_bytes(file, max_bytes=max_bytes), max_bytes=max_bytes))


def unpacked(file: Path, content: bytes, *, max_bytes: int = DATA_BYTES) -> bytes:
    """The content of a file, unpacked if its name ends in .gz.

    Raises:
        OSError: there is more than `max_bytes` in it.
        BadContent: it is not gzip, or not all of it is there.
    """
    if file.suffix != ".gz":
        return content
    try:
        with GzipFile(fileobj=BytesIO(content)) as stream:
            return _whole(file, stream, max_bytes)
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise BadContent(f"not a whole gzip file: {error}") from error


def decoded(content: bytes) -> str:
    """Raises BadContent if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadContent(f"not UTF-8 text: {error}") from error


class Line(NamedTuple):
    """A line of a file of JSON values; the first one has number 1."""

    number: int
    value: Any


def read_lines(file: Path, *, max_bytes: int = DATA_BYTES) -> Iterator[Line]:
    """The JSON values of a file that has one on every line, unpacked if its name ends in .gz; empty lines left out.

    Raises:
        OSError: as `read_bytes`.
        BadContent: a line is no JSON; names it.
    """
    content = unpacked(file, read_bytes(file, max_bytes=max_bytes), max_bytes=max_bytes)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield Line(number, parse_json(line))
            except BadContent as error:
                raise BadContent(f"line {number}: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """A JSON value.

    Raises:
        BadContent: it is none, is nested too deeply, or has a number of too many digits.
    """
    try:
        return from_json(content)
    except ValueError as error:
        raise BadContent(f"not JSON: {error}") from error


def first_fault(error: ValidationError) -> str:
    """What a model of pydantic's says about a value, in one short line: where, and what.

    That of a field that nobody knows, as others are missing where a name was misspelled; else the first.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}"[:MAX_SHOWN] if place else first["msg"][:MAX_SHOWN]


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        OSError: as `read_bytes`.
        BadContent: as `parse_toml`.
    """
    return parse_toml(read_bytes(file, max_bytes=CONFIG_BYTES))


def parse_toml(content: bytes) -> dict[str, Any]:
    """A TOML document, whose integers have 64 bits as TOML demands.

    Raises:
        BadContent: it is none, an integer is larger, or it is nested deeper than `MAX_DEPTH`.
    """
    try:
        table = tomllib.loads(decoded(content))
    except RecursionError as error:
        raise BadContent("tables or arrays are nested too deeply") from error
    except BadContent:
        raise
    except ValueError as error:  # of tomllib, or of a number of too many digits
        raise BadContent(str(error)) from error
    _require_plain(table)
    return table


def _require_plain(table: dict[str, Any]) -> None:
    level: list[object] = [table]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise BadContent("an integer does not fit into 64 bits")
        if not inner:
            return
        level = inner
    raise BadContent(f"tables or arrays are nested more than {MAX_DEPTH} deep")


def _whole(file: Path, stream: BufferedReader | GzipFile, max_bytes: int) -> bytes:
    """Read block by block, as sizes of files say little and a limit nothing about how much there is."""
    content = bytearray()
    while block := stream.read(BLOCK_BYTES):
        content += block
        if len(content) > max_bytes:
            raise OSError(errno.EFBIG, f"it holds more than {max_bytes:,} bytes", str(file))
    return bytes(content)


def _not_regular(kind: str) -> str:
    return f"it is {kind}, not a regular file"
