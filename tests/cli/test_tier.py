"""`kvcomm tier`: what a tier's owner sees, checks and removes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.tiers.keys import ROOT
from kvcomm.tiers.tier import RenditionName, Tier
from tests.tiers.kv import NAMESPACE, RUN, SECRET, make_kv, make_space

IDS = tuple(range(20, 32))
DAY_S = 86_400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tier of two tenants: three runs of a prefix each, a rendition and a bank; beside it somebody else's file."""
    root = tmp_path / "tier"
    tier = Tier.open(str(root), secret=SECRET, run_tokens=RUN)
    for tenant in ("default", "other"):
        tier.put_prefix(make_space(tenant=tenant), IDS, make_kv(IDS))
    segment = Segment(IDS[:3])
    name = RenditionName(segment.digest(NAMESPACE), "signature", 5)
    tier.put_rendition(make_space(), name, segment.token_ids, make_kv(segment.token_ids), Fidelity.APPROXIMATE)
    tier.put_blob(make_space(), "bank", "first \x1b[31m bank", b"content")
    tier.close()
    (root / "notes.txt").write_text("somebody else's")
    return root


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    assert run(["tier", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["tier", *map(str, arguments)]) == code
    return capsys.readouterr().out


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / ROOT).rglob("*") if path.is_file())


def damaged(folder: Path) -> Path:
    file = next(path for path in objects(folder) if path.parent.name == "prefix")
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    return file


def test_ls(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = call(capsys, "ls", folder)["objects"]
    assert [each["kind"] for each in found].count("prefix") == 6
    (rendition,) = (each for each in found if each["kind"] == "rendition")
    assert (rendition["num_tokens"], rendition["start"], rendition["fidelity"]) == (3, 5, "approximate")
    assert {each["refusal"] for each in found} == {None}
    shown = text(capsys, "ls", folder)
    assert "4..8" in shown
    assert "\x1b" not in shown


def test_stat(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = call(capsys, "stat", folder)
    assert (found["kind"], found["num_objects"], found["spaces"]) == ("folder", 8, 2)
    assert {each["kind"]: each["num_objects"] for each in found["kinds"]} == {"prefix": 6, "rendition": 1, "bank": 1}
    assert found["num_bytes"] == sum(path.stat().st_size for path in objects(folder))
    assert "8 objects" in text(capsys, "stat", f"file://{folder}")


def test_verify_names_what_is_bad(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert call(capsys, "verify", folder) == {"num_objects": 8, "num_bytes": pytest.approx(8e4, abs=8e4), "bad": []}
    file = damaged(folder)
    (bad,) = call(capsys, "verify", folder, code=1)["bad"]
    assert bad["key"] == str(file.relative_to(folder))
    assert "altered" in bad["refusal"]
    assert "1 bad" in text(capsys, "verify", folder, code=1)
    file.write_bytes(b"no record")
    assert [each["refusal"] for each in call(capsys, "ls", folder, code=1)["objects"]].count(None) == 7


def test_prune_bad(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    file = damaged(folder)
    assert call(capsys, "prune", folder, "--bad", "--dry-run")["removed_objects"] == 1
    assert file.exists()
    assert call(capsys, "prune", folder, "--bad")["removed_objects"] == 1
    assert not file.exists()
    assert call(capsys, "verify", folder)["num_objects"] == 7


def test_prune_by_bytes_and_age(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    old = objects(folder)[0]
    moment = old.stat().st_mtime - 10 * DAY_S
    os.utime(old, (moment, moment))
    assert call(capsys, "prune", folder, "--older-than", "9")["removed_objects"] == 1
    assert not old.exists()
    assert call(capsys, "prune", folder, "--keep-bytes", "0")["num_objects"] == 0
    assert objects(folder) == []
    assert (folder / "notes.txt").exists()
    assert "nothing of kvcomm's there" in text(capsys, "ls", folder)


def test_leftovers(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / ROOT / ".x.abcdefgh.part").touch()
    assert "1 leftover" in text(capsys, "prune", folder, "--leftovers")
    assert not (folder / ROOT / ".x.abcdefgh.part").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("ls", "FOLDER/misspelt"), 1, "No such file"),
        (("stat", "ftp://host"), 1, "is not known"),
        (("verify", "redis://127.0.0.1:1/0"), 1, "cannot be used as a tier"),
        (("prune", "FOLDER"), 2, "say what to prune"),
        (("prune", "FOLDER", "--keep-bytes", "-1"), 2, "keep-bytes"),
    ],
)
def test_one_clear_line(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    assert run(["tier", *(each.replace("FOLDER", str(folder)) for each in arguments)]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err
    assert not (folder / "misspelt").exists()
