"""Records that a run keeps line by line, so that it can be interrupted at any moment and go on from there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvcomm.errors import InvalidRequest
from kvcomm.lab.files import BadContent, decoded, locked, parse_json, read_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


class RecordFile(Generic[Record]):
    """A file of JSON lines, one dataclass each. Records may be added from several threads and processes."""

    def __init__(self, file: Path, read: Callable[[Any], Record]) -> None:
        """Make one.

        Args:
            read: makes a record of a line's JSON value; may raise what a value of another form leads to.
        """
        self.file = file
        self._read = read
        self._lock = threading.Lock()

    def read(self) -> list[Record]:
        """Every record, in the order in which they were added; a last line that was cut off is left out.

        Raises:
            InvalidRequest: the file cannot be read, or another line is damaged; names it.
        """
        try:
            lines = read_bytes(self.file).splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InvalidRequest(f"{self.file} cannot be read: {error.strerror or error}") from error
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(self._read(parse_json(decoded(line))))
            except (BadContent, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                if number == len(lines):
                    break
                raise InvalidRequest(f"{self.file}, line {number}: not a record ({error!r})") from error
        return records

    def add(self, records: Iterable[Record]) -> None:
        """Append records; they are on disk, as far as the system goes, when this returns."""
        lines = "".join(json.dumps(asdict(each), separators=(",", ":")) + "\n" for each in records)
        with self._lock, locked(self.file.parent):
            self._mend()
            with self.file.open("a", encoding="utf-8") as out:
                out.write(lines)

    def _mend(self) -> None:
        """Drop a last line that was cut off."""
        if self.file.exists() and not self._ends_whole():
            content = self.file.read_bytes()
            self.file.write_bytes(content[: content.rfind(b"\n") + 1])

    def _ends_whole(self) -> bool:
        with self.file.open("rb") as content:
            size = content.seek(0, 2)
            content.seek(max(0, size - 1))
            return content.read() in (b"\n", b"")
