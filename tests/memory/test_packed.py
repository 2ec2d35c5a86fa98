"""Safetensors in bytes: what `safetensors` writes is read, what is written it reads, and no byte is trusted."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.files.reading import BadContent
from kvcomm.memory.packed import ALIGNMENT, DTYPES, header_bytes, pack, unpack, unpack_metadata

METADATA = {"format": "1", "name": 'a "quoted" ü\n'}


def tensors() -> dict[str, Tensor]:
    made = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)) for name, dtype in DTYPES.items()}
    return made | {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "turned": torch.randn(4, 3).T}


def content_of(parts: list[memoryview]) -> memoryview:
    return memoryview(bytearray(b"".join(parts)))


def test_safetensors_reads_it() -> None:
    given = tensors()
    read = safetensors.torch.load(bytes(content_of(pack(given, METADATA))))
    assert set(read) == set(given)
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_what_safetensors_writes_is_read() -> None:
    given = {name: tensor.contiguous() for name, tensor in tensors().items()}
    metadata, read = unpack(memoryview(bytearray(safetensors.torch.save(given, METADATA))))
    assert metadata == METADATA
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in given.items())


def test_nothing_is_copied() -> None:
    tensor = torch.zeros(5)
    parts = pack({"a": tensor}, {})
    tensor[0] = 1.0
    content = content_of(parts)
    _, read = unpack(content)
    assert read["a"][0] == 1.0
    content[-4:] = memoryview(torch.tensor([7.0]).numpy().tobytes())
    assert read["a"][4] == 7.0
    assert header_bytes(content) % ALIGNMENT == 0


def test_metadata_by_the_leading_bytes() -> None:
    content = content_of(pack(tensors(), METADATA))
    assert unpack_metadata(content[: header_bytes(content)]) == METADATA
    with pytest.raises(BadContent):
        unpack_metadata(content[: header_bytes(content) - 1])


def test_dtypes_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        pack({"a": torch.zeros(2, dtype=torch.complex64)}, {})


def bad(table: object, data: bytes = b"12345678") -> memoryview:
    header = json.dumps(table).encode()
    return memoryview(bytearray(len(header).to_bytes(8, "little") + header + data))


@pytest.mark.parametrize(
    "content",
    [
        memoryview(bytearray()),
        memoryview(bytearray(b"1234567")),
        memoryview(bytearray((2**60).to_bytes(8, "little"))),
        bad([]),
        bad({"__metadata__": {"a": 1}}, b""),
        bad({"__metadata__": []}, b""),
        bad({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789"),
        bad({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234567"),
        bad({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"1234567812345678"),
        bad({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        bad({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}),
        bad({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}),
        bad({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}),
        bad({"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}),
        bad({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}),
        bad({"a": {"dtype": "F32", "shape": [2**61, 2**61], "data_offsets": [0, 8]}}),
        bad({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}),
        bad({"a": {"dtype": "F32", "shape": [2]}}),
        bad({"a": 5}),
        bad({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}),
    ],
)
def test_what_is_no_whole_file(content: memoryview) -> None:
    with pytest.raises(BadContent):
        unpack(content)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_is_refused_or_read_as_tensors(data: st.DataObject) -> None:
    content = bytearray(content_of(pack({"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, METADATA)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for changed in (content, content[:cut]):
        try:
            _, read = unpack(memoryview(changed))
        except BadContent:
            continue
        assert sum(tensor.nbytes for tensor in read.values()) <= len(changed)
