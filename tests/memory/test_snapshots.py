"""Snapshots: what was written comes back bit by bit, and no damaged, foreign or newer file comes back at all."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcomm.errors import SnapshotCorrupt, SnapshotError, SnapshotForeign, SnapshotTooNew
from kvcomm.memory import snapshots
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.snapshots import (
    FORMAT_VERSION,
    SegmentRecord,
    Snapshot,
    SnapshotHeader,
    payload_digest,
    read_header,
    read_snapshot,
    write_snapshot,
)

NAMESPACE = "0123456789abcdef" * 4
SHAPES = [(1, 2, 4), (3, 2, 2)]
"""Per layer (num_kv_heads, key_dim, value_dim)."""
NUM_COMPUTED = 3


def make_header(**changes: Any) -> SnapshotHeader:
    values: dict[str, Any] = {
        "namespace": NAMESPACE,
        "architecture": "TinyForCausalLM",
        "dtype": "torch.float32",
        "name": "planner",
        "token_ids": (5, 0, 96, 7),
        "num_computed": NUM_COMPUTED,
        "path": (SegmentRecord(num_tokens=1, name="rôle"), SegmentRecord(num_tokens=3, name=None)),
        "fidelity": Fidelity.EXACT,
        "created": "2026-11-22T01:02:03+00:00",
        "payload_blake3": "",
    }
    return SnapshotHeader(**values | changes)


def make_tensors(
    *, num_tokens: int = NUM_COMPUTED, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [random(num_tokens, heads, key_dim) for heads, key_dim, _ in SHAPES]
    values = [random(num_tokens, heads, value_dim) for heads, _, value_dim in SHAPES]
    return keys, values, random(11)


def read(file: Path, **changes: Any) -> Snapshot:
    wanted: dict[str, Any] = {"namespace": NAMESPACE, "shapes": SHAPES, "dtype": torch.float32}
    return read_snapshot(file, **wanted | changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A snapshot with logits."""
    target = tmp_path / "planner.safetensors"
    write_snapshot(target, make_header(), *make_tensors())
    return target


@pytest.mark.parametrize("has_logits", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, num_tokens: int, has_logits: bool) -> None:
    keys, values, logits = make_tensors(num_tokens=num_tokens, dtype=dtype)
    written = make_header(dtype=str(dtype), num_computed=num_tokens, fidelity=Fidelity.APPROXIMATE)
    file = tmp_path / "new" / "folder" / "snapshot"
    write_snapshot(file, written, keys, values, logits if has_logits else None)
    header, got_keys, got_values, got_logits = read(file, dtype=dtype)
    digest = payload_digest(keys, values, logits if has_logits else None)
    assert header == written.model_copy(update={"payload_blake3": digest})
    assert read_header(file) == header
    for got, expected in zip((*got_keys, *got_values), (*keys, *values), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected)
    assert (got_logits is not None) == has_logits
    assert got_logits is None or torch.equal(got_logits, logits)


def test_nan_and_signed_zero_survive_bit_by_bit(tmp_path: Path) -> None:
    keys, values, _ = make_tensors()
    keys[0][0] = torch.tensor([float("nan"), -0.0])
    write_snapshot(tmp_path / "file", make_header(), keys, values, None)
    assert torch.equal(read(tmp_path / "file").keys[0].view(torch.int32), keys[0].view(torch.int32))


def test_strided_tensors_are_taken_and_left_alone(tmp_path: Path) -> None:
    keys, values, _ = make_tensors()
    strided = [key.transpose(0, 1).contiguous().transpose(0, 1) for key in keys]
    assert not strided[1].is_contiguous()
    write_snapshot(tmp_path / "file", make_header(), strided, values, None)
    assert torch.equal(read(tmp_path / "file").keys[1], keys[1])
    assert torch.equal(strided[1], keys[1])


def test_any_safetensors_reader_can_read_it(file: Path) -> None:
    keys, values, logits = make_tensors()
    stored = load_file(file)
    assert sorted(stored) == ["keys.0", "keys.1", "logits", "values.0", "values.1"]
    assert torch.equal(stored["keys.1"], keys[1])
    assert torch.equal(stored["values.0"], values[0])
    assert torch.equal(stored["logits"], logits)


def test_the_digest_is_over_dtype_shape_and_bytes_in_order() -> None:
    keys, values, logits = make_tensors()
    digest = blake3()
    for tensor in (*keys, *values, logits):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    assert payload_digest(keys, values, logits) == digest.hexdigest()
    others = (
        payload_digest(keys[::-1], values, logits),
        payload_digest(keys, values, None),
        payload_digest(keys, values, logits.view(torch.int32)),
        payload_digest(keys, values, logits[None]),
    )
    assert digest.hexdigest() not in others


# -- damage -----------------------------------------------------------------------------------------------------------


@cache
def whole_file() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        write_snapshot(file, make_header(), *make_tensors())
        return file.read_bytes()


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


# -- files that are whole but not wanted ------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> None:
    """Change metadata and tensors of a snapshot, as another program might."""
    from safetensors import safe_open

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


# -- writing ----------------------------------------------------------------------------------------------------------


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full_in_safetensors(tensors: object, temporary: Path, metadata: object) -> None:
    temporary.write_bytes(b"half a fi")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "name", "failure"),
    [(snapshots, "save_file", disk_full_in_safetensors), (os, "fsync", disk_full), (Path, "replace", disk_full)],
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, failure: Callable[..., None]
) -> None:
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failure)
        with pytest.raises(SnapshotError, match=r"planner.safetensors cannot be written: .*[Nn]o space left"):
            write_snapshot(file, make_header(name="newer"), *make_tensors())
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == before
    write_snapshot(file, make_header(name="newer"), *make_tensors())
    assert read(file).header.name == "newer"


def test_an_interrupted_write_leaves_nothing_behind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshots, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(file, make_header(), *make_tensors())
    assert os.listdir(file.parent) == [file.name]


def test_places_that_cannot_be_written_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a folder")
    for target in ("folder", "text/file", "n" * 300):
        with pytest.raises(SnapshotError, match="cannot be written"):
            write_snapshot(tmp_path / target, make_header(), *make_tensors())
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_mapped_snapshot_survives_being_replaced(file: Path) -> None:
    mapped = read(file)
    keys, values, _ = make_tensors()
    write_snapshot(file, make_header(), [key + 1 for key in keys], values, None)
    assert torch.equal(mapped.keys[0], keys[0])
    assert torch.equal(read(file).keys[0], keys[0] + 1)


def test_a_file_replaced_while_it_is_read_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the header came from the old file, the tensors from the new one, and a good file was called altered."""
    newer = file.with_name("newer")
    write_snapshot(newer, make_header(name="newer"), *make_tensors())

    def replaced_meanwhile(*tensors: Any) -> str:
        if not newer.exists():
            return payload_digest(*tensors)
        newer.replace(file)
        return "digest of other tensors"

    monkeypatch.setattr(snapshots, "payload_digest", replaced_meanwhile)
    assert read(file).header.name == "newer"


def test_a_file_replaced_all_the_time_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []

    def replaced_meanwhile(*_: Any) -> str:
        times.append(len(times))
        os.utime(file, ns=(0, len(times)))
        return "digest of other tensors"

    monkeypatch.setattr(snapshots, "payload_digest", replaced_meanwhile)
    with pytest.raises(SnapshotError, match="is replaced all the time"):
        read(file)
    assert len(times) == snapshots.MAX_REPLACEMENTS


def test_concurrent_writers_leave_one_whole_file(file: Path) -> None:
    """Readers meanwhile see one of the versions, never a mixture."""
    keys, values, logits = make_tensors()
    seen: list[float] = []
    stop = threading.Event()

    def keep_writing(offset: int) -> None:
        for _ in range(12):
            shifted = [key + offset for key in keys]
            write_snapshot(file, make_header(name=str(offset)), shifted, values, logits)

    def keep_reading() -> None:
        while not stop.is_set():
            snapshot = read(file)
            offset = 0 if snapshot.header.name == "planner" else int(snapshot.header.name or "")
            assert torch.equal(snapshot.keys[0], keys[0] + offset)
            seen.append(offset)

    writers = [threading.Thread(target=keep_writing, args=(offset,)) for offset in (1, 2, 3)]
    reader = threading.Thread(target=keep_reading)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert seen
    assert os.listdir(file.parent) == [file.name]
    assert read(file).header.name in {"1", "2", "3"}
