"""Request traces: reading them, and turning their block ids into tokens.

Two formats are known. *mooncake*: one request a line, `hash_ids` of 512-token blocks, ids global to the file.
*agentic*: one session a line with `block_size`, `requests` with `hash_runs` ([first id, count] pairs) and
nested `requests` of subagents; ids are local to the session, so each session gets a namespace of its own.
Sessions have no common clock: they run side by side, each from its own second 0.

A trace says nothing about tokens: distinct blocks get tokens that differ at every offset, equal blocks equal
ones.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MOONCAKE_BLOCK_SIZE = 512  # tokens; the format does not carry it

IdArray = npt.NDArray[np.int32]


class Request(NamedTuple):
    """One prompt: ids of its prefix blocks, comparable within its session. `num_output`: tokens of its answer."""

    session: int
    at_s: float
    blocks: IdArray
    num_output: int | None = None  # where the trace says


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they arrive."""

    format: str
    block_size: int  # tokens
    num_sessions: int
    requests: tuple[Request, ...]
    sha256: str  # of the file

    @property
    def num_blocks(self) -> int:
        """Blocks of all prompts, with repetition."""
        return sum(request.blocks.size for request in self.requests)


class TraceError(ValueError):
    """The file is no trace of a known format; names file and line."""


def read_trace(file: str | Path, *, limit: int | None = None) -> Trace:
    """Read the first `limit` lines (all if None): requests of a mooncake trace, sessions of an agentic one.

    Raises:
        TraceError: no known format, or nothing in it.
        OSError: the file cannot be read.
    """
    file = Path(file)
    raw = file.read_bytes()
    lines = list(islice(_parsed(file, raw), limit))
    if not lines:
        raise TraceError(f"{file} holds no request")
    try:
        requests, block_size, kind = _requests(lines)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{file} is neither a mooncake nor an agentic trace: {error!r}") from error
    sessions = len({request.session for request in requests})
    return Trace(kind, block_size, sessions, tuple(requests), hashlib.sha256(raw).hexdigest())


def block_tokens(blocks: IdArray, block_size: int) -> IdArray:
    """Token ids [num_blocks * block_size] of `blocks`, in [0, 2**31).

    At each offset the map from block to token is one to one (multiplication by an odd number modulo 2**31).
    """
    first = blocks.astype(np.uint32) * np.uint32(2_654_435_761)
    steps = np.arange(block_size, dtype=np.uint32) * np.uint32(81_007)
    return ((first[:, None] + steps) & np.uint32(0x7FFF_FFFF)).astype(np.int32).ravel()


def _parsed(file: Path, raw: bytes) -> Iterator[dict[str, Any]]:
    try:
        text = gzip.decompress(raw) if file.suffix == ".gz" else raw
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise TraceError(f"{file}, line {number}: expected an object, not {type(value).__name__}")
                yield value
    except (gzip.BadGzipFile, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} holds no JSON lines: {error}") from error


def _requests(lines: list[dict[str, Any]]) -> tuple[list[Request], int, str]:
    if "hash_ids" in lines[0]:
        requests = [
            Request(0, line["timestamp"] / 1000, _ids(line["hash_ids"]), line.get("output_length")) for line in lines
        ]
        return requests, MOONCAKE_BLOCK_SIZE, "mooncake"
    sizes = {int(line["block_size"]) for line in lines}
    if len(sizes) != 1:
        raise ValueError(f"sessions with block sizes {sorted(sizes)}")
    requests = [
        request for session, line in enumerate(lines) for request in _of_session(session, 0.0, line["requests"])
    ]
    return sorted(requests, key=lambda request: request.at_s), sizes.pop(), "agentic"


def _of_session(session: int, start_s: float, entries: list[dict[str, Any]]) -> Iterator[Request]:
    """Requests of a session, those of its subagents at their own start."""
    for entry in entries:
        at_s = start_s + float(entry["t"])
        if "requests" in entry:
            yield from _of_session(session, at_s, entry["requests"])
        else:
            runs = [np.arange(first, first + count, dtype=np.int32) for first, count in entry["hash_runs"]]
            yield Request(session, at_s, np.concatenate(runs) if runs else _ids([]), entry.get("out"))


def _ids(values: list[int]) -> IdArray:
    ids = np.array(values, dtype=np.int64).astype(np.int32)
    if (ids < 0).any() or ids.tolist() != values:
        raise ValueError("block ids must be integers in [0, 2**31)")
    return ids
