"""Banks as files: they come back bit for bit or are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.align.bank import AnchorBank, BankShape, BankSnapshot
from kvcomm.align.bank_file import FORMAT, load_bank, read_bank_header, save_bank
from kvcomm.align.edges import Edge
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign, AnchorFileTooNew

SHAPE = BankShape((None, 6), (None, 4), 2, 5)
EDGE = Edge("aa", "bb", "question", "text")


def bank(num_tokens: int = 7) -> BankSnapshot:
    generator = torch.Generator().manual_seed(num_tokens)
    keys = OffsetRows.quantize(torch.randn(num_tokens, 6, generator=generator))
    values = OffsetRows.quantize(torch.randn(num_tokens, 4, generator=generator))
    made = AnchorBank(EDGE, SHAPE)
    made.learn(torch.randn(2, num_tokens, 5, generator=generator), OffsetTable((None, keys), (None, values)))
    return made.snapshot()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("bank") / "a.anchors.safetensors"
    save_bank(bank(), SHAPE, "ns", file)
    return file.read_bytes()


def same(one: BankSnapshot, other: BankSnapshot) -> bool:
    pairs = zip((*one.offsets.keys, *one.offsets.values), (*other.offsets.keys, *other.offsets.values), strict=True)
    return (
        torch.equal(one.sketches, other.sketches)
        and torch.equal(one.texts, other.texts)
        and all(
            (a is None and b is None)
            or (a is not None and b is not None and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales))
            for a, b in pairs
        )
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_bank_comes_back_bit_for_bit(tmp_path: Path, num_tokens: int) -> None:
    whole, kept = bank(), torch.arange(num_tokens)
    texts = torch.tensor([4, 4, 5, 6, 6, 6, 9], dtype=torch.int32)[kept]
    snapshot = BankSnapshot(EDGE, 3, whole.sketches[:, kept], whole.offsets.take(kept), texts)
    header = save_bank(snapshot, SHAPE, "ns", tmp_path / "deep" / "a.anchors.safetensors")
    again = load_bank(tmp_path / "deep" / "a.anchors.safetensors", namespace="ns", shape=SHAPE)
    assert same(snapshot, again)
    assert (again.edge, header.num_tokens) == (EDGE, num_tokens)
    assert read_bank_header(tmp_path / "deep" / "a.anchors.safetensors") == header


def test_another_models_bank_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a"
    save_bank(bank(), SHAPE, "ns", file)
    with pytest.raises(AnchorFileForeign, match="another namespace"):
        load_bank(file, namespace="other", shape=SHAPE)
    with pytest.raises(AnchorFileForeign, match="another shape"):
        load_bank(file, namespace="ns", shape=SHAPE._replace(dim=6))


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    FORMAT._replace(version=FORMAT.version + 1).write(tmp_path / "a", "{}", {})
    with pytest.raises(AnchorFileTooNew, match=f"version {FORMAT.version + 1}"):
        read_bank_header(tmp_path / "a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnchorFileError, match="cannot be read"):
        read_bank_header(tmp_path / "missing")
    (tmp_path / "text").write_text("no bank")
    with pytest.raises(AnchorFileCorrupt):
        read_bank_header(tmp_path / "text")
    FORMAT._replace(version_key="kvcomm_snapshot").write(tmp_path / "snapshot", "{}", {"sketches": torch.zeros(1)})
    with pytest.raises(AnchorFileCorrupt, match="not a kvcomm anchor bank"):
        read_bank_header(tmp_path / "snapshot")
    FORMAT.write(tmp_path / "empty", "{}", {})
    with pytest.raises(AnchorFileCorrupt, match="does not fit the format"):
        read_bank_header(tmp_path / "empty")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_means_the_same(
    data: st.DataObject, written: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = data.draw(st.integers(0, len(written) - 1))
    cut = data.draw(st.booleans())
    damaged = written[:at] if cut else written[:at] + bytes([written[at] ^ (1 << at % 8)]) + written[at + 1 :]
    file = tmp_path_factory.mktemp("damaged") / "a"
    file.write_bytes(damaged)
    try:
        again = load_bank(file, namespace="ns", shape=SHAPE)
    except AnchorFileError:
        return
    assert same(again, bank())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AnchorFileError, match="cannot be written"):
        save_bank(bank(), SHAPE, "ns", tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    save_bank(bank(), SHAPE, "ns", file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AnchorFileError, match="No space left"):
        save_bank(bank(3), SHAPE, "ns", file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]
