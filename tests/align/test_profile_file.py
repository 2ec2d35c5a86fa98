"""Profiles: what comes back is what was saved, and nothing else ever does."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.align.bank import AnchorBank, BankShape, BankSnapshot
from kvcomm.align.bank_file import SUFFIX
from kvcomm.align.calibration import Pair
from kvcomm.align.edges import Edge
from kvcomm.align.groups import EdgeGroup, GroupKey
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.profile_file import GROUPS_FILE, bank_name, load_profile, save_profile
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign

SHAPE = BankShape((None, 8), (None, 6), 2, 5)
EDGES = (Edge("s1", "t", "question", "question"), Edge("s2", "t", "solver", "answer"))


def bank(edge: Edge, seed: int) -> BankSnapshot:
    generator = torch.Generator().manual_seed(seed)
    made = AnchorBank(edge, SHAPE)

    def rows(channels: int) -> OffsetRows:
        return OffsetRows.quantize(torch.randn(7, channels, generator=generator))

    made.learn(torch.randn(2, 7, 5, generator=generator), OffsetTable((None, rows(8)), (None, rows(6))))
    return made.snapshot()


def group() -> EdgeGroup:
    made = EdgeGroup(GroupKey(tuple((edge, True) for edge in EDGES), "token", (0.0, 0.5)), (1.0, 0.0))
    for index in range(9):
        made.contest.add((0.01 * index, 0.02 * index))
        made.calibration.add(Pair((0.01 * index, 0.001 * index), 0.3, (None, 0.1)))
    made.head_weights = (0.5, -0.25, 1e-9)
    breaker = made.breaker((0.02, 0.05))
    for _ in range(3):
        breaker.observe(True)
    return made


def saved(folder: Path) -> Path:
    save_profile(folder, "n", SHAPE, [bank(edge, seed) for seed, edge in enumerate(EDGES)], [group()])
    return folder


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    profile = load_profile(saved(tmp_path / "a"), namespace="n", shape=SHAPE)
    assert (len(profile.banks), profile.num_tokens, profile.num_pairs, profile.num_dropped) == (2, 14, 9, 0)
    (loaded,), original = profile.groups, group()
    assert loaded.key == original.key
    assert loaded.strength == original.strength == 1.0
    assert loaded.contest == original.contest
    assert loaded.head_weights == original.head_weights
    assert loaded.calibration.pairs == original.calibration.pairs
    one, other = loaded.breakers[0.02, 0.05], original.breakers[0.02, 0.05]
    assert one.tripped is other.tripped is True
    assert one.log_evidence == other.log_evidence
    assert (one.num_observed, one.num_violations) == (3, 3)
    for edge in EDGES:
        (mine,) = [each for each in profile.banks if each.edge == edge]
        theirs = bank(edge, EDGES.index(edge))
        assert torch.equal(mine.sketches, theirs.sketches)
        assert mine.offsets.keys[1] is not None
        assert theirs.offsets.keys[1] is not None
        assert torch.equal(mine.offsets.keys[1].codes, theirs.offsets.keys[1].codes)


def test_a_group_goes_with_its_banks(tmp_path: Path) -> None:
    """A calibration says nothing about other anchors than those it was made with."""
    folder = saved(tmp_path)
    (folder / bank_name(EDGES[0])).unlink()
    assert load_profile(folder, namespace="n", shape=SHAPE).num_dropped == 1
    other = tmp_path / "other"
    save_profile(other, "n", SHAPE, [bank(EDGES[0], 99)], [])
    (other / bank_name(EDGES[0])).rename(folder / bank_name(EDGES[0]))
    profile = load_profile(folder, namespace="n", shape=SHAPE)
    assert (len(profile.banks), profile.groups, profile.num_dropped) == (2, (), 1)


def test_another_models_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(AnchorFileForeign, match=r"belongs to another namespace \(n, wanted m\)"):
        load_profile(folder, namespace="m", shape=SHAPE)
    with pytest.raises(AnchorFileForeign, match="another shape"):
        load_profile(folder, namespace="n", shape=SHAPE._replace(dim=6))


def test_a_missing_or_unreadable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnchorFileError, match="nowhere"):
        load_profile(tmp_path / "nowhere", namespace="n", shape=SHAPE)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(AnchorFileError, match="cannot be written: No space left on device"):
        saved(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(AnchorFileError, match="cannot be written"):
        saved(folder / GROUPS_FILE / "below a file")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damaged_file_is_ever_taken(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(tmp_path_factory.mktemp("profile"))
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with pytest.raises(AnchorFileError):
        load_profile(folder, namespace="n", shape=SHAPE)


def test_a_file_that_contradicts_itself_is_corrupt(tmp_path: Path) -> None:
    made = group()
    made.contest.totals = [1.0]
    save_profile(tmp_path, "n", SHAPE, [], [made])
    with pytest.raises(AnchorFileCorrupt, match="a total for every strength"):
        load_profile(tmp_path, namespace="n", shape=SHAPE)


def test_files_are_named_by_edge(tmp_path: Path) -> None:
    names = {file.name for file in saved(tmp_path).iterdir()}
    assert names == {GROUPS_FILE, *(edge.digest[:24] + SUFFIX for edge in EDGES)}
