"""Snapshots: what was written comes back bit by bit, and a write appears whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvcomm.errors import SnapshotError
from kvcomm.memory import sealed_file, snapshots
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.snapshots import payload_digest, read_header, write_snapshot
from tests.limits import threads
from tests.memory.snapshot_files import make_header, make_tensors, read, write_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_file(tmp_path)


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


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full_in_safetensors(tensors: object, temporary: Path, metadata: object) -> None:
    temporary.write_bytes(b"half a fi")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "name", "failure"),
    [
        (safetensors.torch, "save_file", disk_full_in_safetensors),
        (os, "fsync", disk_full),
        (Path, "replace", disk_full),
    ],
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

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
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
    assert len(times) == sealed_file.MAX_REPLACEMENTS


def test_concurrent_writers_leave_one_whole_file(file: Path) -> None:
    """Readers meanwhile see one of the versions, never a mixture."""
    keys, values, logits = make_tensors()
    seen: list[float] = []
    stop = threading.Event()

    def keep_writing(offset: int) -> None:
        num_written = 0
        while num_written < 12 or len(seen) < 3:  # however slow the reader is
            num_written += 1
            shifted = [key + offset for key in keys]
            write_snapshot(file, make_header(name=str(offset)), shifted, values, logits)

    def keep_reading() -> None:
        while not stop.is_set():
            snapshot = read(file)
            offset = 0 if snapshot.header.name == "planner" else int(snapshot.header.name or "")
            assert torch.equal(snapshot.keys[0], keys[0] + offset)
            seen.append(offset)

    with threads(keep_reading):
        try:
            with threads(*(partial(keep_writing, offset) for offset in (1, 2, 3))):
                pass
        finally:
            stop.set()
    assert len(seen) >= 3
    assert os.listdir(file.parent) == [file.name]
    assert read(file).header.name in {"1", "2", "3"}
