"""Request traces: reading them, and turning their block ids into tokens.

Two formats are known. *mooncake*: one request a line, `hash_ids` of 512-token blocks, ids global to the file.
*agentic*: one session a line with `block_size`, `requests` with `hash_runs` ([first id, count] pairs) and
nested `requests` of subagents; ids are local to the session, so each session gets a namespace of its own.
Sessions have no common clock: they run side by side, each from its own second 0.

A trace says nothing about tokens: distinct blocks get tokens that differ at every offset, equal blocks equal
ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import BadContent, parse_json, read_bytes, unpacked

MOONCAKE_BLOCK_SIZE = 512  # tokens; the format does not carry it
MAX_BLOCK_SIZE = 2**20
MAX_BLOCKS = 2**29
"""Of all prompts of a trace: two gigabytes of ids."""

MAX_ID = 2**31 - 1
YEARS_S = 1e10

BlockId = Annotated[int, Field(ge=0, le=MAX_ID)]
BoundedCount = Annotated[int, Field(ge=0, le=MAX_ID)]
Seconds = Annotated[float, Field(ge=0, le=YEARS_S, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1000 * YEARS_S, allow_inf_nan=False)]

IdArray = npt.NDArray[np.int32]


class TraceRequest(NamedTuple):
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
    requests: tuple[TraceRequest, ...]
    sha256: str  # of the file

    @property
    def num_blocks(self) -> int:
        """Blocks of all prompts, with repetition."""
        return sum(request.blocks.size for request in self.requests)


class TraceError(InvalidRequest):
    """The file cannot be read, or is no trace of a known format; names file and line."""


def read_trace(file: str | Path, *, limit: int | None = None) -> Trace:
    """Read the first `limit` lines (all if None): requests of a mooncake trace, sessions of an agentic one.

    Raises:
        TraceError: it cannot be read, is of no known format, or there is nothing in it.
    """
    file = Path(file)
    try:
        raw = read_bytes(file)
        lines = [line for line in unpacked(file, raw).split(b"\n") if line.strip()][:limit]
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise TraceError(f"{file} is {error}") from error
    if not lines:
        raise TraceError(f"{file} holds no request")
    try:
        requests, block_size, kind = _requests(lines)
    except BadContent as error:
        raise TraceError(f"{file}: {error}") from error
    sessions = len({request.session for request in requests})
    return Trace(kind, block_size, sessions, tuple(requests), hashlib.sha256(raw).hexdigest())


def block_tokens(blocks: IdArray, block_size: int) -> IdArray:
    """Token ids [num_blocks * block_size] of `blocks`, in [0, 2**31).

    At each offset the map from block to token is one to one (multiplication by an odd number modulo 2**31).
    """
    first = blocks.astype(np.uint32) * np.uint32(2_654_435_761)
    steps = np.arange(block_size, dtype=np.uint32) * np.uint32(81_007)
    return ((first[:, None] + steps) & np.uint32(0x7FFF_FFFF)).astype(np.int32).ravel()


def _requests(lines: list[bytes]) -> tuple[list[TraceRequest], int, str]:
    first = parse_json(lines[0]) if lines else None
    if not isinstance(first, dict):
        raise BadContent(f"line 1: expected an object, not {type(first).__name__}")
    room = _Room()
    if "hash_ids" in first:
        return [_of_line(each, room) for each in _checked(lines, _Line)], MOONCAKE_BLOCK_SIZE, "mooncake"
    sessions = _checked(lines, _Session)
    sizes = {each.block_size for each in sessions}
    if len(sizes) != 1:
        raise BadContent(f"sessions with block sizes {sorted(sizes)}")
    requests = [
        request for number, each in enumerate(sessions) for request in _of_session(number, 0.0, each.requests, room)
    ]
    return sorted(requests, key=lambda request: request.at_s), sizes.pop(), "agentic"


def _checked(lines: list[bytes], kind: type[ModelT]) -> list[ModelT]:
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise BadContent(f"line {number}: {_why(error)}") from error
    return found


def _why(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg']}"
    place = ".".join(str(part) for part in first["loc"])
    if place.startswith("hash_ids.") or ".hash_runs." in place:
        return f"neither a mooncake nor an agentic trace: block ids must be integers in [0, 2**31) ({place})"
    return f"neither a mooncake nor an agentic trace ({place}: {first['msg']})"


def _of_line(line: _Line, room: _Room) -> TraceRequest:
    room.take(len(line.hash_ids))
    return TraceRequest(0, line.timestamp / 1000, np.array(line.hash_ids, dtype=np.int32), line.output_length)


def _of_session(session: int, start_s: float, entries: tuple[_Entry, ...], room: _Room) -> Iterator[TraceRequest]:
    """Requests of a session, those of its subagents at their own start."""
    for entry in entries:
        at_s = start_s + entry.t
        if entry.requests is not None:
            yield from _of_session(session, at_s, entry.requests, room)
        else:
            room.take(sum(count for _, count in entry.hash_runs or ()))
            runs = [np.arange(first, first + count, dtype=np.int32) for first, count in entry.hash_runs or ()]
            yield TraceRequest(session, at_s, np.concatenate([np.empty(0, dtype=np.int32), *runs]), entry.out)


class _Room:
    """How many blocks may still be made: a run of a few bytes can stand for any number of them."""

    def __init__(self) -> None:
        self._num_left = MAX_BLOCKS

    def take(self, num_blocks: int) -> None:
        """Raises BadContent for more than there are left."""
        self._num_left -= num_blocks
        if self._num_left < 0:
            raise BadContent(f"more than {MAX_BLOCKS:,} blocks in all")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)  # other fields are nobody's business here


class _Line(_Strict):
    timestamp: Milliseconds
    hash_ids: tuple[BlockId, ...]
    output_length: BoundedCount | None = None


class _Entry(_Strict):
    t: Seconds
    requests: tuple[_Entry, ...] | None = None
    hash_runs: tuple[tuple[BlockId, BoundedCount], ...] | None = None
    out: BoundedCount | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if self.requests is None and self.hash_runs is None:
            raise ValueError("needs hash_runs, or requests of a subagent")
        if any(first + count > MAX_ID + 1 for first, count in self.hash_runs or ()):
            raise ValueError("a run of block ids goes beyond 2**31")
        return self


class _Session(_Strict):
    block_size: Annotated[int, Field(ge=1, le=MAX_BLOCK_SIZE)]
    requests: tuple[_Entry, ...]


ModelT = TypeVar("ModelT", bound=_Strict)
