"""Careful reading and writing of files for evaluations: what others may have made or be making, bounded and whole.

Reading takes regular files only, up to a limit, and says in one line what is wrong with their content. Writing puts a
file in its place whole or not at all; a lock on a folder keeps two runs from mixing what they keep there.
"""

from __future__ import annotations

from kvcomm.files.reading import (
    CONFIG_BYTES,
    BadContent,
    Line,
    decoded,
    open_regular,
    parse_json,
    read_bytes,
    read_lines,
    read_text,
)
from kvcomm.files.writing import locked, replacing

__all__ = [
    "CONFIG_BYTES",
    "BadContent",
    "Line",
    "decoded",
    "locked",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_lines",
    "read_text",
    "replacing",
]
