"""The layout of safetensors in bytes: written in parts without copying a tensor, and read where they lie.

Eight bytes say how long the JSON is that follows; it names every tensor with its dtype, shape and place in the bytes
behind it, which they fill without a gap. `safetensors` itself reads and writes files only, or copies everything. This
module knows the layout and trusts no byte of it; what the tensors mean is its caller's matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcomm.files.reading import BadContent, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 64
"""Bytes; tensors begin at a multiple of it where all dtypes before allow it."""
MAX_HEADER = 100_000_000
"""Bytes of JSON at most, as in `safetensors`."""
PREFIX_BYTES = 8
METADATA = "__metadata__"

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Packed(NamedTuple):
    """What bytes hold; the tensors are views of them."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """The parts of a file, in order. Tensors on the CPU that are contiguous are not copied.

    Raises:
        ValueError: a dtype has no name in the layout.
    """
    table: dict[str, Any] = {METADATA: dict(metadata)}
    parts: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _NAMES:
            raise ValueError(f"tensors of {tensor.dtype} cannot be packed")
        content = tensor_bytes(tensor)
        start, end = end, end + content.nbytes
        table[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        parts.append(content)
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(PREFIX_BYTES + len(header)) % ALIGNMENT)
    return [memoryview(len(header).to_bytes(PREFIX_BYTES, "little") + header), *parts]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in its own memory where that is possible."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def header_bytes(content: memoryview) -> int:
    """How many leading bytes hold the header, by the first eight of them.

    Raises:
        BadContent: there are no eight, or they say what cannot be.
    """
    if len(content) < PREFIX_BYTES:
        raise BadContent(f"only {len(content)} bytes")
    num_bytes = int.from_bytes(content[:PREFIX_BYTES], "little")
    if num_bytes > MAX_HEADER:
        raise BadContent(f"a header of {num_bytes} bytes")
    return PREFIX_BYTES + num_bytes


def unpack_metadata(content: memoryview) -> dict[str, str]:
    """The metadata alone, by the leading bytes.

    Raises:
        BadContent: they do not hold a whole header.
    """
    return _metadata(_table(content))


def unpack(content: memoryview) -> Packed:
    """Everything that bytes hold.

    Args:
        content: writable, as torch knows no tensor that must not be written; nothing here writes it.

    Raises:
        BadContent: they are not exactly one whole file of this layout.
    """
    table = _table(content)
    start = header_bytes(content)
    metadata = _metadata(table)
    places = sorted(((name, _place(name, table[name])) for name in table if name != METADATA), key=_order)
    end = 0
    for name, place in places:
        if place.start != end:
            raise BadContent(f"tensor {name!r} begins at byte {place.start}, not at {end}")
        end = place.end
    if start + end != len(content):
        raise BadContent(f"{len(content)} bytes, not {start + end}")
    return Packed(metadata, {name: _tensor(content, start, place) for name, place in places})


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _order(item: tuple[str, _Place]) -> tuple[int, int]:
    return item[1].start, item[1].end


def _table(content: memoryview) -> dict[str, Any]:
    end = header_bytes(content)
    if len(content) < end:
        raise BadContent(f"{len(content)} bytes, and a header of {end}")
    table = parse_json(bytes(content[PREFIX_BYTES:end]))
    if not isinstance(table, dict):
        raise BadContent("its header is no table")
    return table


def _metadata(table: dict[str, Any]) -> dict[str, str]:
    metadata = table.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise BadContent("its metadata are not texts")
    return metadata


def _place(name: str, entry: Any) -> _Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadContent(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    named = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if named is None or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise BadContent(f"tensor {name!r} has a dtype, shape or place that cannot be")
    import torch

    dtype: torch.dtype = getattr(torch, named)
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise BadContent(f"tensor {name!r} takes {end - start} bytes, not those of {dtype} {shape}")
    return _Place(dtype, tuple(shape), start, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**62 for each in value)


def _tensor(content: memoryview, start: int, place: _Place) -> Tensor:
    import torch

    count = math.prod(place.shape)
    if count == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(content, dtype=place.dtype, count=count, offset=start + place.start)
    return flat.view(place.shape)
