"""What a tenant has learned, as files: what comes back is what was saved, and nothing else ever does."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvcomm.align.bank import AnchorBank, BankShape, BankSnapshot
from kvcomm.align.bank_file import SUFFIX
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.edges import Edge
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import KeptWatch, Knowledge
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.profile_file import EARLIER_FILE, READERS_FILE, bank_name, load_profile, read_readers, save_profile
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level
from kvcomm.align.watch import Watch
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign, AnchorFileTooOld
from tests.limits import PATIENCE_S

SHAPE = BankShape((None, 8), (None, 6), 2, 5)
EDGES = (Edge("s1", "11" * 32, "question", "question"), Edge("s2", "t", "solver", "answer"))
TURNED, CORRECTED = Rung("rotate", 0.3), Rung("token", 0.0)
SOLVER = Reader("5a" * 32, ("question",), ("11" * 32,))
CHECKER = Reader("c4" * 32, ("question", "solver"), ("22" * 32, "33" * 32))
BOUND = Bound(0.02, 0.05)


def bank(edge: Edge, seed: int) -> BankSnapshot:
    """Seven anchor tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = AnchorBank(edge, SHAPE)

    def rows(channels: int) -> OffsetRows:
        return OffsetRows.quantize(torch.randn(7, channels, generator=generator))

    made.learn(torch.randn(2, 7, 5, generator=generator), OffsetTable((None, rows(8)), (None, rows(6))))
    return made.snapshot()


def pair(number: int) -> Pair:
    """The pair of one prompt; every third one was measured along the turned ladder alone."""
    measured = {TURNED: Measured(0.01 * number, 0.1)}
    distances = {"rotate": 0.0}
    if number % 3:
        measured[CORRECTED] = Measured(0.001 * number)
        distances["token"] = 0.25
    return Pair(measured, distances, Sources(3, 1, 2, 100 + number))


def watch(*divergences: float, bound: Bound = BOUND) -> Watch:
    """A watch that has seen some audits."""
    made = Watch(bound)
    for divergence in divergences:
        made.audited(divergence)
    return made


def knowledge() -> Knowledge:
    """Two readers, one with nine pairs and one with two, and what audits say at every level."""
    readers = ((SOLVER, tuple(map(pair, range(1, 10)))), (CHECKER, (pair(10), pair(11))))
    watches = (
        KeptWatch(Level.PRIOR, "", watch(1.0, 0.0)),
        KeptWatch(Level.POOL, "", watch(0.0, bound=Bound(0.05, 0.1))),
        KeptWatch(Level.OWN, SOLVER.digest, watch(0.0, 0.01)),
        KeptWatch(Level.PRIOR, CHECKER.digest, watch(1.0, 1.0, 1.0)),
    )
    return Knowledge(readers, watches, (0.5, -0.25, 1e-9))


def saved(folder: Path) -> Path:
    """A folder with all of it."""
    save_profile(folder, "n", SHAPE, [bank(edge, seed) for seed, edge in enumerate(EDGES)], knowledge())
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same folder after somebody has written other values into the file of readers, with right digests."""
    file = folder / READERS_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    header = json.loads(metadata["header"])
    change(header)
    metadata["header"] = json.dumps(header)
    metadata["header_blake3"] = blake3(metadata["header"].encode()).hexdigest()
    save_file({}, file, metadata)
    return folder


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    profile = load_profile(saved(tmp_path / "a"), namespace="n", shape=SHAPE)
    assert (len(profile.banks), profile.num_tokens, profile.num_pairs, profile.num_missing) == (2, 14, 11, 0)
    loaded, original = profile.knowledge, knowledge()
    assert loaded.readers == original.readers
    assert [reader.targets for reader, _ in loaded.readers] == [SOLVER.targets, CHECKER.targets]
    assert loaded.head_weights == original.head_weights
    for mine, theirs in zip(loaded.watches, original.watches, strict=True):
        assert mine[:2] == theirs[:2]
        assert mine.watch.bound == theirs.watch.bound
        assert mine.watch.debt == theirs.watch.debt
        ours, others = mine.watch.breaker, theirs.watch.breaker
        assert (ours.num_observed, ours.num_violations, ours.tripped) == (
            others.num_observed,
            others.num_violations,
            others.tripped,
        )
        assert ours.log_evidence == others.log_evidence
    assert [kept.watch.breaker.tripped for kept in loaded.watches] == [False, False, False, True]
    for edge in EDGES:
        (mine_,) = [each for each in profile.banks if each.edge == edge]
        theirs_ = bank(edge, EDGES.index(edge))
        assert torch.equal(mine_.sketches, theirs_.sketches)
        assert mine_.offsets.keys[1] is not None
        assert theirs_.offsets.keys[1] is not None
        assert torch.equal(mine_.offsets.keys[1].codes, theirs_.offsets.keys[1].codes)


def _without(folder: Path) -> None:
    (folder / bank_name(EDGES[0])).unlink()


def _other(folder: Path) -> None:
    """Other anchors of the same edge."""
    other = folder.parent / "other"
    save_profile(other, "n", SHAPE, [bank(EDGES[0], 99)], Knowledge())
    (other / bank_name(EDGES[0])).rename(folder / bank_name(EDGES[0]))


def _swapped(folder: Path) -> None:
    """The anchors are all there, but of the other edge."""
    save_profile(folder, "n", SHAPE, [bank(edge, 1 - seed) for seed, edge in enumerate(EDGES)], Knowledge())


@pytest.mark.parametrize(("change", "num_banks", "num_missing"), [(_without, 1, 1), (_other, 2, 1), (_swapped, 2, 2)])
def test_corrected_rungs_go_with_their_banks(
    change: Callable[[Path], None], num_banks: int, num_missing: int, tmp_path: Path
) -> None:
    """A pair says nothing about other anchors than those it was measured with; turned keys have none."""
    folder = saved(tmp_path / "a")
    kept = (folder / READERS_FILE).read_bytes()
    change(folder)
    (folder / READERS_FILE).write_bytes(kept)
    profile = load_profile(folder, namespace="n", shape=SHAPE)
    assert (len(profile.banks), profile.num_missing, profile.num_pairs) == (num_banks, num_missing, 11)
    for (_, pairs), (_, originals) in zip(profile.knowledge.readers, knowledge().readers, strict=True):
        for mine, original in zip(pairs, originals, strict=True):
            assert mine.measured == {TURNED: original.measured[TURNED]}
            assert mine.sources == original.sources


def test_two_banks_of_one_edge_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / f"copy{SUFFIX}").write_bytes((folder / bank_name(EDGES[0])).read_bytes())
    with pytest.raises(AnchorFileCorrupt, match="several banks of one edge"):
        load_profile(folder, namespace="n", shape=SHAPE)


def test_another_models_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(AnchorFileForeign, match=r"belongs to another namespace \(n, wanted m\)"):
        load_profile(folder, namespace="m", shape=SHAPE)
    with pytest.raises(AnchorFileForeign, match="another shape"):
        load_profile(folder, namespace="n", shape=SHAPE._replace(dim=6))


def test_a_missing_or_unreadable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnchorFileError, match="nowhere"):
        load_profile(tmp_path / "nowhere", namespace="n", shape=SHAPE)


def test_what_an_earlier_version_left_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / EARLIER_FILE).write_bytes(b"groups of edges")
    with pytest.raises(AnchorFileTooOld, match=rf"{EARLIER_FILE} is of an earlier version.* learn anew"):
        load_profile(tmp_path, namespace="n", shape=SHAPE)
    assert load_profile(saved(tmp_path), namespace="n", shape=SHAPE).num_pairs == 11  # it was saved into all the same


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
        saved(folder / READERS_FILE / "below a file")


def test_two_who_save_at_once_leave_what_one_of_them_had(tmp_path: Path) -> None:
    """Whatever is loaded meanwhile belongs together: banks of one and pairs of the other would not fit."""
    folder, trouble = tmp_path / "shared", []
    saved(folder)

    def save(seed: int) -> None:
        try:
            for _ in range(5):
                banks = [bank(edge, seed + number) for number, edge in enumerate(EDGES)]
                save_profile(folder, "n", SHAPE, banks, Knowledge(((SOLVER, (pair(seed),)),)))
        except Exception as error:  # told by the test
            trouble.append(error)

    threads = [Thread(target=save, args=(seed,)) for seed in (4, 7)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        profile = load_profile(folder, namespace="n", shape=SHAPE)
        assert profile.num_missing == 0
        if len(profile.knowledge.readers) == 1:
            ((_, (measured,)),) = profile.knowledge.readers
            seed = measured.sources.num_tokens - 100
            mine = {each.edge: each for each in profile.banks}
            assert torch.equal(mine[EDGES[0]].sketches, bank(EDGES[0], seed).sketches)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert trouble == []


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


def _first_pair(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["readers"][0]["pairs"][0]
    return found


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a rung that is not listed": (
        lambda header: _first_pair(header)["measured"][0].update(rung=9),
        "beyond the 2 listed",
    ),
    "a rung twice in a pair": (
        lambda header: _first_pair(header)["measured"].append(_first_pair(header)["measured"][0]),
        "rung 0 is listed twice",
    ),
    "a rung listed twice": (lambda header: header["rungs"].append(header["rungs"][0]), "rung .* is listed twice"),
    "a reader twice": (lambda header: header["readers"].append(header["readers"][0]), "reader .* is listed twice"),
    "a watch twice": (lambda header: header["watches"].append(header["watches"][0]), "watch .* is listed twice"),
    "a watch of nobody": (lambda header: header["watches"][2].update(reader="0" * 64), "is not there"),
    "an own level of all readers": (lambda header: header["watches"][2].update(reader=""), "level own"),
    "more violations than audits": (
        lambda header: header["watches"][2].update(num_violations=99),
        "no more violations",
    ),
    "a ratio too few": (lambda header: header["watches"][2]["log_ratios"].pop(), "needs 5 ratios"),
    "a divergence that is no number": (
        lambda header: _first_pair(header)["measured"][0].update(divergence=float("nan")),
        "divergence",
    ),
    "a negative distance": (lambda header: _first_pair(header)["distances"].update(token=-0.1), "distances"),
    "a count as text": (lambda header: _first_pair(header).update(sources=["3", 1, 2, 3]), "sources"),
    "a digest that is none": (lambda header: header["readers"][0].update(digest="../x"), "digest"),
    "an unknown field": (lambda header: header.update(more=1), "more"),
    "a field that is missing": (lambda header: header.pop("banks"), "banks"),
    "a share above 1": (lambda header: header["rungs"][0].update(share=1.5), "share"),
    "a debt below 0": (lambda header: header["watches"][0].update(debt=-0.1), "debt"),
    "a target that is none": (lambda header: header["readers"][0].update(targets=["t"]), "targets"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_corrupt(contradiction: str, tmp_path: Path) -> None:
    change, why = CONTRADICTIONS[contradiction]
    folder = rewritten(saved(tmp_path), change)
    with pytest.raises(AnchorFileCorrupt, match=rf"{READERS_FILE} does not fit the format: .*{why}"):
        read_readers(folder)
    with pytest.raises(AnchorFileCorrupt):
        load_profile(folder, namespace="n", shape=SHAPE)


def test_files_are_named_by_edge(tmp_path: Path) -> None:
    names = {file.name for file in saved(tmp_path).iterdir()}
    assert names == {READERS_FILE, *(edge.digest[:24] + SUFFIX for edge in EDGES)}
