"""`kvcomm anchors`: folders of banks, without any model."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcomm.align.archive import export_archive, import_archive
from kvcomm.align.bank_file import SUFFIX
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.estimators import TokenSettings
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import Knowledge
from kvcomm.align.profile_file import EARLIER_FILE, READERS_FILE, load_profile, save_profile
from kvcomm.cli.app import run
from kvcomm.errors import AnchorFileError
from tests.align.test_profile_file import CHECKER, CORRECTED, EDGES, SHAPE, SOLVER, TURNED, saved

FIRST = EDGES[0].digest[:12]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "anchors")


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    assert run(["anchors", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int) -> str:
    assert run(["anchors", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def test_ls_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, "ls", folder)
    assert {bank["edge"] for bank in found["banks"]} == {edge.digest[:12] for edge in EDGES}
    assert [(bank["num_tokens"], bank["num_needed"], bank["refusal"]) for bank in found["banks"]] == [(7, 64, None)] * 2
    assert {bank["num_enough"] for bank in found["banks"]} == {TokenSettings().mature_tokens}
    solver, checker = found["readers"]
    assert (solver["reader"], solver["slots"], solver["num_pairs"]) == (SOLVER.digest[:12], ["question"], 9)
    assert ([bank["edge"] for bank in solver["banks"]], checker["banks"]) == ([FIRST], [])  # that lead to it
    # Nine pairs along the turned ladder: enough to begin with at 0.9; with 19 they decide whatever others have.
    assert [tuple(each.values()) for each in solver["own"]] == [(0.9, "rotate", 9, 9, 19), (0.95, "rotate", 9, 19, 39)]
    assert [(each["num_pairs"], each["num_needed"]) for each in checker["own"]] == [(2, 9), (2, 19)]
    assert [(each["num_pairs"], each["num_needed"]) for each in found["pool"]] == [(11, 9), (11, 19)]
    assert found["refusals"] == []


def test_show_a_bank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "show", folder, FIRST[:5])
    assert (shown["edge"], shown["slot"], shown["source"], shown["num_tokens"]) == (FIRST, "question", "s1", 7)


def test_show_a_reader(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What each rung cost is read off by hand: the n-th prompt broke by 0.01 n turned, and by 0.001 n corrected."""
    shown = call(capsys, "show", folder, SOLVER.digest[:4])
    turned, corrected = shown["rungs"]
    assert (turned["rung"], turned["num_pairs"]) == (str(TURNED), 9)
    assert (turned["median"], turned["within_95"]) == pytest.approx((0.05, 0.09))
    assert (corrected["rung"], corrected["num_pairs"]) == (str(CORRECTED), 6)  # 1, 2, 4, 5, 7, 8
    assert (corrected["median"], corrected["within_95"]) == pytest.approx((0.005, 0.008))
    assert not any(each for rung in shown["rungs"] for each in rung["chosen"].values())  # four of nine are over 0.05
    (watched,) = shown["watches"]
    assert (watched["level"], watched["num_audited"], watched["tripped"]) == ("own", 2, False)
    (watched,) = call(capsys, "show", folder, CHECKER.digest)["watches"]
    assert (watched["level"], watched["num_violations"], watched["tripped"]) == ("prior", 3, True)


def test_show_says_what_would_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine prompts within the bound: enough for 0.9, not for 0.95; the boldest rung that holds, rung by rung."""
    safe, bold, loose = (Rung("rotate", share) for share in (0.3, 0.15, 0.0))
    pairs = tuple(Pair({safe: Measured(0.01), bold: Measured(0.04), loose: Measured(0.3)}) for _ in range(9))
    save_profile(tmp_path, "n", SHAPE, [], Knowledge(((SOLVER, pairs),)))
    chosen = {each["rung"]: each["chosen"] for each in call(capsys, "show", tmp_path, "5a")["rungs"]}
    assert chosen[str(safe)] == {"(0.02, 0.95)": False, "(0.05, 0.95)": False, "(0.05, 0.9)": False}
    assert chosen[str(bold)] == {"(0.02, 0.95)": False, "(0.05, 0.95)": False, "(0.05, 0.9)": True}
    assert set(chosen[str(loose)].values()) == {False}


def test_tables_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["anchors", "ls", str(folder)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "question -> question, one context",
        "7 of 512 or more",
        "2 of 9",
        "all readers together: pairs 11 at 0.9, 11 of 19 at 0.95",
    ):
        assert words in shown
    assert run(["anchors", "show", str(folder), FIRST]) == 0
    assert "s1" in capsys.readouterr().out
    assert run(["anchors", "show", str(folder), SOLVER.digest[:6]]) == 0
    assert "banks that lead to it" in capsys.readouterr().out
    assert run(["anchors", "show", str(folder), CHECKER.digest[:6]]) == 0
    shown = capsys.readouterr().out
    for words in ("question, solver", "pairs 2 of 9 at 0.9", "tripped"):
        assert words in shown


def test_what_is_not_there_or_not_the_only_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no bank or reader" in error(capsys, "show", folder, "zz", code=2)
    assert "4 of them" in error(capsys, "show", folder, "", code=2)
    assert "no reader" in error(capsys, "prune", folder, "--reader", FIRST, code=2)
    assert "no bank" in error(capsys, "prune", folder, "--edge", SOLVER.digest[:12], code=2)


def test_a_damaged_bank_is_refused_in_its_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / f"bad{SUFFIX}"
    file.write_bytes(b"no bank")
    found = call(capsys, "ls", folder, code=1)["banks"]
    assert [bank["refusal"] is None for bank in found].count(False) == 1
    assert "not a whole safetensors file" in error(capsys, "show", folder, "bad", code=1)


def test_damaged_readers_are_refused_beside_the_banks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / READERS_FILE).write_bytes(b"no readers")
    found = call(capsys, "ls", folder, code=1)
    assert (len(found["banks"]), found["readers"], len(found["refusals"])) == (2, [], 1)
    assert READERS_FILE in found["refusals"][0]
    assert run(["anchors", "ls", str(folder)]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().out
    assert call(capsys, "show", folder, FIRST)["edge"] == FIRST
    assert READERS_FILE in error(capsys, "prune", folder, "--edge", FIRST, code=1)
    assert (folder / f"{EDGES[0].digest[:24]}{SUFFIX}").exists()


def test_what_an_earlier_version_left_is_named_with_the_way_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / EARLIER_FILE).write_bytes(b"groups of edges")
    found = call(capsys, "ls", folder, code=1)
    assert (len(found["readers"]), len(found["refusals"])) == (2, 1)
    (folder / READERS_FILE).unlink()
    found = call(capsys, "ls", folder, code=1)
    assert (found["readers"], len(found["refusals"])) == ([], 1)
    assert "learn anew" in found["refusals"][0]
    assert "learn anew" in error(capsys, "export", folder, tmp_path / "a.tar", code=1)
    with tarfile.open(tmp_path / "old.tar", "w") as out:
        out.add(folder / EARLIER_FILE, EARLIER_FILE)
    assert "learn anew" in error(capsys, "import", tmp_path / "old.tar", tmp_path / "new", code=1)
    assert not (tmp_path / "new").exists()


def test_prune_takes_corrected_rungs_along(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_profile(folder, namespace="n", shape=SHAPE).knowledge
    dry = call(capsys, "prune", folder, "--edge", FIRST, "--dry-run")
    assert (dry["removed"], dry["removed_readers"], dry["cut_pairs"]) == ([FIRST], [], 8)
    assert load_profile(folder, namespace="n", shape=SHAPE).knowledge.readers == before.readers
    assert call(capsys, "prune", folder, "--edge", FIRST)["cut_pairs"] == 8
    left = load_profile(folder, namespace="n", shape=SHAPE)
    assert ([bank.edge for bank in left.banks], left.num_missing, left.num_pairs) == ([EDGES[1]], 0, 11)
    assert {rung for _, pairs in left.knowledge.readers for pair in pairs for rung in pair.measured} == {TURNED}
    assert [(each.level, each.reader) for each in left.knowledge.watches] == [
        (each.level, each.reader) for each in before.watches
    ]


def test_prune_a_reader_with_what_was_watched_about_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = call(capsys, "prune", folder, "--reader", CHECKER.digest[:8])
    assert (gone["removed"], gone["removed_readers"], gone["cut_pairs"]) == ([], [CHECKER.digest[:12]], 0)
    left = load_profile(folder, namespace="n", shape=SHAPE)
    assert (len(left.banks), left.num_missing) == (2, 0)
    assert [reader for reader, _ in left.knowledge.readers] == [SOLVER]
    assert {each.reader for each in left.knowledge.watches} == {"", SOLVER.digest}


def test_a_damaged_bank_that_pairs_rest_on_can_be_pruned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / f"{EDGES[0].digest[:24]}{SUFFIX}"
    file.write_bytes(b"no bank any more")
    assert call(capsys, "prune", folder, "--edge", FIRST)["cut_pairs"] == 8
    left = load_profile(folder, namespace="n", shape=SHAPE)
    assert ([bank.edge for bank in left.banks], left.num_missing) == ([EDGES[1]], 0)


def test_prune_by_age_and_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (folder / f"{edge.digest[:24]}{SUFFIX}" for edge in EDGES)
    os.utime(old, (0, 0))
    assert call(capsys, "prune", folder, "--older-than", "1", "--dry-run")["removed"] == [FIRST]
    assert call(capsys, "prune", folder, "--keep-bytes", str(new.stat().st_size), "--dry-run")["removed"] == [FIRST]
    assert len(call(capsys, "prune", folder, "--keep-bytes", "0", "--dry-run")["removed"]) == 2
    assert "say what to prune" in error(capsys, "prune", folder, code=2)


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, target = tmp_path / "team.tar", tmp_path / "new" / "anchors"
    assert call(capsys, "export", folder, archive)["num_banks"] == 2
    assert "exists" in error(capsys, "export", folder, archive, code=2)
    assert call(capsys, "import", archive, target)["num_banks"] == 2
    for file in folder.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert "exists" in error(capsys, "import", archive, target, code=2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../x" + SUFFIX, tarfile.REGTYPE),
        ("/tmp/x" + SUFFIX, tarfile.REGTYPE),
        ("a/" + READERS_FILE, tarfile.REGTYPE),
        ("x" + SUFFIX, tarfile.SYMTYPE),
        ("x" + SUFFIX, tarfile.LNKTYPE),
        ("x" + SUFFIX, tarfile.CHRTYPE),
        ("." + SUFFIX, tarfile.REGTYPE),
        ("run.sh", tarfile.REGTYPE),
    ],
)
def test_an_archive_of_anything_else_leaves_no_folder(
    name: str, kind: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as out:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
        out.addfile(member, io.BytesIO(b"abc"))
    assert "nothing was imported" in error(capsys, "import", archive, tmp_path / "new", code=1)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.tar"]


def test_damaged_archives_leave_no_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "team.tar"
    call(capsys, "export", folder, archive)
    content = archive.read_bytes()
    with tarfile.open(archive) as whole:
        boundaries = [member.offset for member in whole]  # a tar cut there still looks whole
    for cut in (0, 100, 700, len(content) // 2, *boundaries):
        archive.write_bytes(content[:cut])
        error(capsys, "import", archive, tmp_path / "new", code=1)
        assert not (tmp_path / "new").exists()
    archive.write_bytes(content)
    assert "is not a folder of anchors" in error(capsys, "ls", tmp_path / "nowhere", code=2)


def test_an_archive_that_claims_more_than_it_holds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse member of a few bytes would fill the disk."""
    archive = tmp_path / "bad.tar"
    member = tarfile.TarInfo("x" + SUFFIX)
    member.type = tarfile.GNUTYPE_SPARSE
    archive.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    error(capsys, "import", archive, tmp_path / "new", code=1)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.tar"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(flips=st.lists(st.tuples(st.integers(0, 1535), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_flipped_archive_is_an_error_or_what_it_was(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Headers hold what digests do not cover: times and owners."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    source = saved(root / "anchors")
    export_archive(source, root / "a.tar")
    content = bytearray((root / "a.tar").read_bytes())
    for at, change in flips:
        content[at % len(content)] ^= change
    (root / "a.tar").write_bytes(content)
    try:
        import_archive(root / "a.tar", root / "new")
    except AnchorFileError:
        assert not (root / "new").exists()
    else:
        assert load_profile(root / "new", namespace="n", shape=SHAPE).num_missing == 0
