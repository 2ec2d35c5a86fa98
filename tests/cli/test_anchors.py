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
from kvcomm.align.profile_file import GROUPS_FILE, load_profile
from kvcomm.cli.app import run
from kvcomm.errors import AnchorFileError
from tests.align.test_profile_file import EDGES, SHAPE, saved

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


def test_ls_and_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, "ls", folder)
    assert found["num_groups"] == 1
    assert {bank["edge"] for bank in found["banks"]} == {edge.digest[:12] for edge in EDGES}
    assert [(bank["num_tokens"], bank["num_pairs"], bank["refusal"]) for bank in found["banks"]] == [(7, 9, None)] * 2
    shown = call(capsys, "show", folder, FIRST[:5])
    (group,) = shown["groups"]
    assert (shown["slot"], group["slots"], group["strength"]) == ("question", ["question", "solver"], 1.0)
    assert [rung["share"] for rung in group["rungs"]] == [0.0, 0.5]
    assert group["rungs"][0]["median"] == pytest.approx(0.04)
    assert group["chosen"] == {"(0.02, 0.05)": None, "(0.05, 0.05)": None}  # nine pairs promise nothing at 0.05
    assert group["tripped"] == [[0.02, 0.05]]


def test_tables_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["anchors", "ls", str(folder)]) == 0
    assert "question -> question, one context" in capsys.readouterr().out
    assert run(["anchors", "show", str(folder), FIRST]) == 0
    assert "question, solver" in capsys.readouterr().out


def test_a_damaged_bank_is_refused_in_its_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / f"bad{SUFFIX}"
    file.write_bytes(b"no bank")
    found = call(capsys, "ls", folder, code=1)["banks"]
    assert [bank["refusal"] is None for bank in found].count(False) == 1
    assert "not a whole safetensors file" in error(capsys, "show", folder, "bad", code=1)


def test_prune_takes_the_groups_along(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = call(capsys, "prune", folder, "--edge", FIRST, "--dry-run")
    assert (dry["removed"], dry["removed_groups"]) == ([FIRST], 1)
    assert load_profile(folder, namespace="n", shape=SHAPE).num_pairs == 9
    call(capsys, "prune", folder, "--edge", FIRST)
    left = load_profile(folder, namespace="n", shape=SHAPE)
    assert ([bank.edge for bank in left.banks], left.groups, left.num_dropped) == ([EDGES[1]], (), 0)


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
        ("a/" + GROUPS_FILE, tarfile.REGTYPE),
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
        assert load_profile(root / "new", namespace="n", shape=SHAPE).num_dropped == 0
