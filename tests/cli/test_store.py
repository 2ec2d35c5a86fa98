"""The folder of names: what is listed, refused, shared and never left half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvcomm.cli.store import Store, StoredSegment, context_entry, place, remove, way_out
from kvcomm.errors import (
    CacheFolderError,
    InvalidRequest,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotForeign,
    SnapshotTooNew,
)
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.memory.snapshots import SegmentRecord, SnapshotHeader, payload_digest, write_snapshot
from tests.files.special import SPECIAL, make_special
from tests.limits import PATIENCE_S, at_once


def write_context(file: Path, token_ids: tuple[int, ...] = (1, 2, 3), *, namespace: str = "n") -> Path:
    """A snapshot of one layer, one head, one channel."""
    keys = [torch.arange(len(token_ids), dtype=torch.float32).view(-1, 1, 1)]
    values = [-keys[0]]
    header = SnapshotHeader(
        namespace=namespace,
        architecture="Tiny",
        dtype="torch.float32",
        name="whatever",
        token_ids=token_ids,
        num_computed=len(token_ids),
        path=(SegmentRecord(num_tokens=len(token_ids), name=None),),
        fidelity=Fidelity.EXACT,
        created="2026-01-02T03:04:05+00:00",
        payload_blake3=payload_digest(keys, values, None),
    )
    write_snapshot(file, header, keys, values, None)
    return file


def stored_segment(token_ids: tuple[int, ...] = (5, 6)) -> StoredSegment:
    return StoredSegment(
        namespace="n",
        model="m",
        digest=Segment(token_ids).digest("n"),
        created="2026-01-02T03:04:05+00:00",
        text="hi",
        token_ids=token_ids,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def filled(store: Store) -> Store:
    """A good context "good" between a truncated, a foreign and an empty one."""
    good = write_context(store.folder / "good.safetensors").read_bytes()
    (store.folder / "cut.safetensors").write_bytes(good[:-5])
    (store.folder / "zero.safetensors").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, store.folder / "foreign.safetensors")
    return store


def test_making_a_store_touches_nothing(store: Store) -> None:
    assert store.contexts() == []
    assert store.segments() == []
    assert not store.folder.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path))
    assert Store().folder == tmp_path / "contexts"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a b", "a\n", "ä", "x" * 101, "a.safetensors"],
)
def test_bad_names(filled: Store, name: str) -> None:
    before = sorted(filled.folder.iterdir())
    calls: list[Callable[[], object]] = [
        lambda: filled.context(name),
        lambda: filled.new_context(name, force=True),
        lambda: filled.fork_context("good", name, force=True),
        lambda: filled.remove_context(name),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match=r"bad name"):
            call()
    assert sorted(filled.folder.iterdir()) == before


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "a..b", "x" * 100])
def test_good_names(store: Store, name: str) -> None:
    assert store.new_context(name) == store.folder / f"{name}.safetensors"


def test_listing_names_what_it_refuses_and_keeps_the_rest(filled: Store) -> None:
    (filled.folder / "notes.txt").write_text("not ours")
    (filled.folder / ".good.safetensors.x.part").write_bytes(b"")
    (filled.folder / "folder.safetensors").mkdir()

    entries = {entry.name: entry for entry in filled.contexts()}
    assert list(entries) == ["cut", "foreign", "good", "zero"]
    assert (entries["good"].refusal, entries["good"].num_links) == (None, 1)
    assert entries["good"].header is not None
    assert entries["good"].header.token_ids == (1, 2, 3)
    for name, why in {"cut": "not a whole", "zero": "not a whole", "foreign": "not a kvcomm snapshot"}.items():
        assert entries[name].header is None
        assert why in (entries[name].refusal or "")
        assert str(filled.folder) not in (entries[name].refusal or "")
    assert filled.usable_context("good").header is not None


def test_names_sort_as_names(store: Store) -> None:
    for name in ("left-1", "left", "a"):
        write_context(store.folder / f"{name}.safetensors")
    assert [entry.name for entry in store.contexts()] == ["a", "left", "left-1"]


@pytest.mark.parametrize("name", ["cut", "zero", "foreign"])
def test_refused_contexts_name_the_file_and_the_way_out(filled: Store, name: str) -> None:
    with pytest.raises(SnapshotCorrupt, match=rf"{name}\.safetensors .*; remove it with `kvcomm context rm {name}`$"):
        filled.usable_context(name)
    with pytest.raises(SnapshotCorrupt):
        filled.fork_context(name, "new")
    assert filled.remove_context(name) >= 0
    assert name not in [entry.name for entry in filled.contexts()]


@pytest.mark.parametrize("kind", [SnapshotForeign, SnapshotTooNew, SnapshotCorrupt])
def test_way_out_keeps_the_type(kind: type[SnapshotError]) -> None:
    with pytest.raises(kind, match=r"why.*kvcomm context rm x"), way_out("x"):
        raise kind("why")


def test_missing_context_lists_those_there_are(filled: Store) -> None:
    with pytest.raises(InvalidRequest, match=r"no context 'nix' in .*; there are: cut, foreign, good, zero"):
        filled.context("nix")


def test_taken_name(filled: Store) -> None:
    with pytest.raises(InvalidRequest, match=r"'good' exists .* --force"):
        filled.new_context("good")
    assert filled.new_context("good", force=True).exists()


def test_fork_shares_the_file_and_copies_nothing(filled: Store) -> None:
    assert filled.fork_context("good", "left") == 0
    good, left = filled.context("good"), filled.context("left")
    assert good.file.samefile(left.file)
    assert left.num_links == 2

    assert filled.fork_context("good", "left", force=True) == 0  # a file replaced by another name of itself
    assert sorted(filled.folder.glob(".*")) == []

    assert filled.remove_context("good") == 0
    assert filled.remove_context("left") == left.num_bytes


def test_fork_without_hard_links_copies(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    good = filled.context("good")
    assert filled.fork_context("good", "left") == good.num_bytes
    assert not filled.context("left").file.samefile(good.file)
    assert filled.context("left").file.read_bytes() == good.file.read_bytes()


def test_a_failing_copy_leaves_what_was_there(filled: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "target"
    target.write_text("old")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(CacheFolderError, match=r"cannot write .*target: No space left"):
        place(filled.context("good").file, target, link=False)
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".part")] == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    broken = Store(tmp_path / "home")
    with pytest.raises(CacheFolderError, match=r"cannot read .*home"):
        broken.contexts()
    with pytest.raises(CacheFolderError, match=r"cannot write .*home.*--dir"):
        broken.write_segment("x", stored_segment())


def test_remove_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CacheFolderError, match=r"cannot remove"):
        remove(tmp_path)


def test_segment_round_trip(store: Store) -> None:
    stored = stored_segment()
    file = store.write_segment("hi", stored)
    assert file == store.folder / "hi.segment.json"
    assert store.segment("hi") == stored
    assert [(entry.name, entry.stored, entry.refusal) for entry in store.segments()] == [("hi", stored, None)]
    with pytest.raises(InvalidRequest, match=r"segment 'hi' exists"):
        store.write_segment("hi", stored)
    store.write_segment("hi", stored_segment((7,)), force=True)
    assert store.segment("hi").token_ids == (7,)
    assert store.remove_segment("hi") > 0
    with pytest.raises(InvalidRequest, match=r"no segment 'hi' .*; there are: none"):
        store.segment("hi")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token_ids": [5, 7]}, "was altered"),
        ({"token_ids": [5, 2**40]}, "was altered"),
        ({"namespace": "other"}, "was altered"),
        ({"format_version": 2}, r"format_version: Input should be 1"),
        ({"format": "notes"}, r"format: Input should be"),
        ({"extra": 1}, "extra"),
    ],
)
def test_altered_segment(store: Store, change: dict[str, object], why: str) -> None:
    file = store.write_segment("hi", stored_segment())
    store.write_segment("good", stored_segment())
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CacheFolderError, match=rf"hi\.segment\.json .*{why}.*kvcomm segment rm hi"):
        store.segment("hi")
    assert [entry.refusal is None for entry in store.segments()] == [True, False]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1}'])
def test_foreign_segment(store: Store, content: bytes) -> None:
    store.folder.mkdir()
    (store.folder / "hi.segment.json").write_bytes(content)
    with pytest.raises(CacheFolderError, match=r"is not a segment file of this version"):
        store.segment("hi")


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_threads_gets_a_new_name(filled: Store, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    """Bug: all looked first, and then all wrote."""
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)

    def won(work: Callable[[], object]) -> bool:
        try:
            work()
        except InvalidRequest as error:
            return "exists in" not in str(error)
        return True

    segments = at_once(24, lambda index: won(lambda: filled.write_segment("seg", stored_segment((index,)))))
    assert segments.count(True) == 1
    assert filled.segment("seg").token_ids == (segments.index(True),)
    assert at_once(24, lambda _: won(lambda: filled.fork_context("good", "fork"))).count(True) == 1
    assert filled.usable_context("fork").header is not None
    assert sorted(filled.folder.glob(".*")) == []


def refuse_links(*_: object, **__: object) -> None:
    raise PermissionError("no links here")


RACER = """
import sys
from pathlib import Path
from kvcomm.cli.store import Store
from kvcomm.errors import InvalidRequest
from tests.cli.test_store import stored_segment
store, won = Store(Path(sys.argv[1])), []
for index in range(20):
    try:
        store.write_segment(f"s{index}", stored_segment())
        won.append(f"s{index}")
    except InvalidRequest:
        pass
    try:
        store.fork_context("good", f"f{index}")
        won.append(f"f{index}")
    except InvalidRequest:
        pass
print(*won)
"""


def test_one_of_many_processes_gets_a_new_name(filled: Store) -> None:
    command = [sys.executable, "-c", RACER, str(filled.folder)]
    root = Path(__file__).parents[2]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    try:
        won = [racer.communicate(timeout=PATIENCE_S)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    names = [f"{kind}{index}" for kind in "sf" for index in range(20)]
    assert sorted(name for each in won for name in each) == sorted(names)


def test_a_name_taken_while_its_context_is_computed(filled: Store) -> None:
    target = filled.new_context("new")
    filled.fork_context("good", "new")
    with pytest.raises(InvalidRequest, match=r"context 'new' exists .* --force"), filled.taking("new"):
        place(filled.context("good").file, target, link=False, is_new=True)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_hinders_no_other_entry(filled: Store, kind: str) -> None:
    with (
        make_special(filled.folder / "odd.safetensors", kind) as file,
        make_special(filled.folder / "odd.segment.json", kind) as segment,
    ):
        assert filled.usable_context("good").header is not None
        assert "good" in [entry.name for entry in filled.contexts()]
        assert [entry.refusal for entry in filled.segments()] in ([], [REFUSED_DEVICE])
        assert "not a regular file" in (context_entry(file).refusal or "")
        with pytest.raises((CacheFolderError, InvalidRequest)):
            filled.segment("odd")
        with pytest.raises(CacheFolderError, match="not a regular file"):
            place(segment, filled.folder / "copy", link=False)


REFUSED_DEVICE = "cannot be read: it is a device, not a regular file"


def test_what_killed_commands_left_is_swept_by_the_next_that_writes(filled: Store) -> None:
    (filled.folder / ".gone.safetensors.abcd1234.part").write_bytes(b"half")
    filled.write_segment("new", stored_segment())
    assert sorted(filled.folder.glob(".*")) == []
