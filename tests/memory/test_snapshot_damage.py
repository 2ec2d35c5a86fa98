"""No damaged, foreign or newer snapshot comes back: every one is refused by name, none with another exception."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomm.errors import SnapshotCorrupt, SnapshotError, SnapshotExists, SnapshotForeign, SnapshotTooNew
from kvcomm.memory.snapshots import FORMAT, FORMAT_VERSION, payload_digest, read_header, write_snapshot
from tests.files.special import SPECIAL, make_special
from tests.memory.snapshot_files import SHAPES, VOCAB_SIZE, make_header, make_tensors, read, write_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_file(tmp_path)


@cache
def whole_file() -> bytes:
    with TemporaryDirectory() as folder:
        return write_file(Path(folder)).read_bytes()


def header_end(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that damaged bytes are written to again and again."""
    return tmp_path_factory.mktemp("damaged") / "file"


@settings(max_examples=600)
@given(data=st.data())
def test_any_flipped_bit_is_refused(scratch: Path, data: st.DataObject) -> None:
    """In the length, the header (names, shapes, offsets, metadata), its padding, and the tensors."""
    damaged = bytearray(whole_file())
    end = header_end(whole_file())
    first, last = data.draw(st.sampled_from([(0, 8), (8, end), (end - 400, end), (end, len(damaged))]))
    position = data.draw(st.integers(first, last - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(damaged)
    with pytest.raises(SnapshotError, match=re.escape(str(scratch))):
        read(scratch)


@settings(max_examples=150)
@given(data=st.data())
def test_any_overwritten_stretch_is_refused(scratch: Path, data: st.DataObject) -> None:
    damaged = bytearray(whole_file())
    start = data.draw(st.integers(0, len(damaged) - 1))
    new = data.draw(st.binary(min_size=1, max_size=40))
    damaged[start : start + len(new)] = new
    if bytes(damaged) == whole_file():
        return
    scratch.write_bytes(damaged)
    with pytest.raises(SnapshotError):
        read(scratch)


@settings(max_examples=100)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    for reader in (read, read_header):
        with pytest.raises(SnapshotCorrupt):
            reader(scratch)


def test_truncation_anywhere_is_refused(scratch: Path) -> None:
    data = whole_file()
    end = header_end(data)
    places = {0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, len(data) - 1, *range(10, len(data), 97)}
    for num_bytes in sorted(places):
        scratch.write_bytes(data[:num_bytes])
        with pytest.raises(SnapshotCorrupt, match="is not a whole safetensors file"):
            read(scratch)


def test_bytes_behind_the_end_are_refused(scratch: Path) -> None:
    scratch.write_bytes(whole_file() + b"\0")
    with pytest.raises(SnapshotCorrupt):
        read(scratch)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 10_000, 0, 1])
def test_a_false_header_length_is_refused(scratch: Path, length: int) -> None:
    """Huge lengths must not be allocated."""
    scratch.write_bytes(struct.pack("<Q", length) + whole_file()[8:])
    with pytest.raises(SnapshotCorrupt):
        read(scratch)


def test_pickles_and_texts_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"keys.0": torch.zeros(2)}, file)
    with pytest.raises(SnapshotCorrupt, match=r"model.pt is not a whole safetensors file"):
        read(file)
    file.write_text('{"namespace": "x"}')
    with pytest.raises(SnapshotCorrupt, match="is not a whole safetensors file"):
        read_header(file)


def test_other_safetensors_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(SnapshotCorrupt, match="is a safetensors file but not a kvcomm snapshot"):
        read(file)


@pytest.mark.parametrize("reader", [read, read_header])
def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    with pytest.raises(SnapshotError, match="nowhere"):
        reader(tmp_path / "nowhere")
    with pytest.raises(SnapshotError, match=re.escape(str(tmp_path))):
        reader(tmp_path)


def rewrite(file: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> None:
    """Change metadata and tensors of a snapshot, as another program might."""
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        metadata, tensors = dict(opened.metadata()), {name: opened.get_tensor(name).clone() for name in names}
    change(metadata, tensors)
    save_file(tensors, file, metadata)


def set_header(metadata: dict[str, str], **changes: Any) -> None:
    """Change the header and give it its own digest."""
    metadata["header"] = json.dumps(json.loads(metadata["header"]) | changes)
    metadata["header_blake3"] = blake3(metadata["header"].encode()).hexdigest()


def test_an_unchanged_rewrite_is_accepted(file: Path) -> None:
    rewrite(file, lambda metadata, tensors: set_header(metadata))
    assert read(file).header.token_ids == (5, 0, 96, 7)


def test_a_foreign_namespace_is_refused_before_anything_else(file: Path) -> None:
    with pytest.raises(SnapshotForeign, match=r"TinyForCausalLM, torch.float32, 0123456789ab, wanted ffffff"):
        read(file, namespace="f" * 64, shapes=[], dtype=torch.bfloat16)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 999_999_999])
def test_a_newer_version_is_refused_by_both_readers(file: Path, version: int) -> None:
    """Even if its header means something else by then."""

    def make_newer(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        metadata |= {"kvcomm_snapshot": str(version), "header": "{}"}

    rewrite(file, make_newer)
    for reader in (read, read_header):
        with pytest.raises(
            SnapshotTooNew, match=rf"format version {version}, this kvcomm reads up to {FORMAT_VERSION}"
        ):
            reader(file)


@pytest.mark.parametrize("version", ["", "0", "-1", "1.0", "one", "٣", "9" * 5000])
def test_an_unreadable_version_is_refused(file: Path, version: str) -> None:
    rewrite(file, lambda metadata, tensors: metadata.update(kvcomm_snapshot=version))
    with pytest.raises(SnapshotCorrupt):
        read(file)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES[:1], "does not hold the tensors of 1 layers"),
        ([*SHAPES, (1, 2, 2)], "does not hold the tensors of 3 layers"),
        ([(2, 2, 4), SHAPES[1]], r"keys of layer 0 are \(3, 1, 2\) torch.float32, not \(3, 2, 2\)"),
        ([(1, 2, 2), SHAPES[1]], r"values of layer 0 are \(3, 1, 4\) torch.float32, not \(3, 1, 2\)"),
        ([SHAPES[0], (3, 4, 2)], r"keys of layer 1 are \(3, 3, 2\) torch.float32, not \(3, 3, 4\)"),
    ],
)
def test_another_models_shapes_are_refused(file: Path, shapes: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(SnapshotCorrupt, match=message):
        read(file, shapes=shapes)


def test_another_dtype_is_refused(file: Path) -> None:
    with pytest.raises(SnapshotCorrupt, match=r"torch.float32, not \(3, 1, 2\) torch.bfloat16"):
        read(file, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"num_computed": 5},
        {"num_computed": 2},
        {"num_computed": -1},
        {"token_ids": [5, 0, 96]},
        {"token_ids": [5, 0, -1, 7]},
        {"token_ids": [5, 0, 2**31, 7]},
        {"token_ids": [5, 0, 1.5, 7]},
        {"path": [{"num_tokens": 5, "name": None}]},
        {"path": [{"num_tokens": -1, "name": None}, {"num_tokens": 5, "name": None}]},
        {"fidelity": "certain"},
        {"surplus": 1},
        {"payload_blake3": "0" * 64},
        {"namespace": None},
    ],
)
def test_a_header_that_contradicts_itself_is_refused_though_its_digest_is_right(
    file: Path, change: dict[str, Any]
) -> None:
    rewrite(file, lambda metadata, tensors: set_header(metadata, **change))
    with pytest.raises(SnapshotCorrupt):
        read(file)


def test_more_kv_than_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_snapshot(file, make_header(num_computed=5), *make_tensors(num_tokens=5))
    with pytest.raises(SnapshotCorrupt, match="contradicts itself about its 4 tokens"):
        read(file)


def _drop_logits(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    del tensors["logits"]


def _swap_layers(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["values.1"] = tensors["values.1"].flip(0)


def _reinterpret_logits(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Bug: the digest covered bytes only, so the same bytes passed as another dtype or shape."""
    tensors["logits"] = tensors["logits"].view(torch.int32)


def _reshape_logits(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["logits"] = tensors["logits"][None]


def _add_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["keys.2"] = torch.zeros(1)


def _drop_header(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    del metadata["header"]


def _drop_digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    del metadata["header_blake3"]


@pytest.mark.parametrize(
    "change",
    [
        _drop_logits,
        _swap_layers,
        _reinterpret_logits,
        _reshape_logits,
        _add_tensor,
        _drop_header,
        _drop_digest,
    ],
)
def test_exchanged_tensors_and_missing_metadata_are_refused(
    file: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]
) -> None:
    rewrite(file, change)
    with pytest.raises(SnapshotCorrupt):
        read(file)


def write_logits(file: Path, logits: Tensor) -> None:
    """A file whose digests are right, whatever its logits are."""
    keys, values, _ = make_tensors()
    header = make_header(payload_blake3=payload_digest(keys, values, logits)).model_dump_json()
    names = ["keys.0", "keys.1", "values.0", "values.1", "logits"]
    FORMAT.write(file, header, dict(zip(names, (*keys, *values, logits), strict=True)))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(VOCAB_SIZE - 1), rf"logits are \({VOCAB_SIZE - 1},\)"),
        (torch.zeros(1, VOCAB_SIZE), "logits are"),
        (torch.zeros(0), "logits are"),
        (torch.tensor(1.0), "logits are"),
        (torch.zeros(VOCAB_SIZE, dtype=torch.int32), r"torch.int32, not \(97,\) torch.float32"),
        (torch.zeros(VOCAB_SIZE, dtype=torch.float64), "torch.float64"),
        (torch.zeros(VOCAB_SIZE, dtype=torch.bool), "torch.bool"),
        (torch.full((VOCAB_SIZE,), float("nan")), "not finite"),
        (torch.tensor([0.0] * (VOCAB_SIZE - 1) + [float("inf")]), "not finite"),
        (torch.tensor([-float("inf")] + [0.0] * (VOCAB_SIZE - 1)), "not finite"),
    ],
)
def test_logits_that_no_model_gives_are_refused_though_their_digest_is_right(
    tmp_path: Path, logits: Tensor, message: str
) -> None:
    """Bug: they were handed to the sampler, which ended the engine, or drew nonsense."""
    write_logits(tmp_path / "file", logits)
    with pytest.raises(SnapshotCorrupt, match=message):
        read(tmp_path / "file")


def test_logits_that_are_as_they_should_be_are_taken(tmp_path: Path) -> None:
    write_logits(tmp_path / "file", torch.ones(VOCAB_SIZE))
    assert read(tmp_path / "file").logits is not None


def test_logits_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    keys, values, logits = make_tensors()
    logits[3] = float("nan")
    write_snapshot(tmp_path / "file", make_header(), keys, values, logits)
    assert read(tmp_path / "file").logits is None


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO used to be waited for."""
    with make_special(tmp_path / "file", kind) as file:
        for reader in (read, read_header):
            with pytest.raises(SnapshotError, match="not a regular file"):
                reader(file)


def test_a_new_name_that_is_taken(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(SnapshotExists, match=r"planner.safetensors exists"):
        write_snapshot(file, make_header(name="newer"), *make_tensors(), is_new=True)
    assert file.read_bytes() == before
    write_snapshot(file, make_header(name="newer"), *make_tensors())
    assert read(file).header.name == "newer"
