"""Priors: pairs that ship with a model come back as they were written, for this model, and come with the package."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcomm.align import prior as module
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.ladder import Rung
from kvcomm.align.prior import FILE, Prior, find_prior, read_prior, require_prior_fits, shipped_priors, write_prior
from kvcomm.errors import AnchorFileCorrupt, AnchorFileError, AnchorFileForeign, AnchorFileTooNew, InvalidRequest

MODEL = "ab" * 32
RUNGS = (Rung("rotate", 0.3), Rung("rotate", 0.15), Rung("rotate", 0.0))
ROOT = Path(module.__file__).parents[2]


def pair(number: int) -> Pair:
    """What one prompt gave at each rung."""
    values = (Measured(0.001 * number, 0.2), Measured(0.002 * number, 1e-9), Measured(0.003 * number))
    return Pair(dict(zip(RUNGS, values, strict=True)), {}, Sources(2, 1, 0, 50 + number))


def prior() -> Prior:
    """Pairs of two workloads, three and two."""
    pairs = {"teams": tuple(map(pair, (1, 2, 3))), "passages": tuple(map(pair, (11, 12)))}
    return Prior(MODEL, pairs, (0.25, -1.5e-3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """That prior in a file."""
    write_prior(prior(), tmp_path / FILE, name="tiny")
    return tmp_path / FILE


def test_what_comes_back_is_what_was_written(file: Path) -> None:
    found = read_prior(file)
    assert found == prior()
    assert list(found.pairs) == ["teams", "passages"]
    assert list(found.pairs["teams"][0].measured) == list(RUNGS)


def test_a_prior_without_head_weights_or_pairs(tmp_path: Path) -> None:
    write_prior(Prior(MODEL, {}), tmp_path / FILE, name="tiny")
    assert read_prior(tmp_path / FILE) == Prior(MODEL, {}, None)
    assert Prior(MODEL, {}).all_pairs == ()


def test_workloads_count_alike() -> None:
    """Else the mix that the bound is about would be that of the largest one."""
    assert prior().all_pairs == (pair(1), pair(2), pair(11), pair(12))


def test_without_a_workload() -> None:
    left = prior().without("teams")
    assert (left.model, left.pairs, left.head_weights) == (MODEL, {"passages": (pair(11), pair(12))}, (0.25, -1.5e-3))
    assert left.all_pairs == (pair(11), pair(12))
    assert prior().without("nothing of that name") == prior()


def test_another_models_is_refused_by_name() -> None:
    require_prior_fits(prior(), MODEL)
    with pytest.raises(AnchorFileForeign, match=r"another model \(abababababab, not cdcdcdcdcdcd\); leave it out"):
        require_prior_fits(prior(), "cd" * 32)


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_later_format_is_refused(version: int, file: Path) -> None:
    """Whatever else has changed with it."""
    file.write_text(json.dumps({"format": version, "pairs": "in another way"}))
    with pytest.raises(AnchorFileTooNew, match=f"{FILE} has a format later than 1"):
        read_prior(file)


def _first(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["workloads"]["teams"][0]
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a divergence too few": (
        lambda value: _first(value)["divergences"].pop(),
        "'teams' does not have a value for each",
    ),
    "a residual too many": (lambda value: _first(value)["residuals"].append(None), "'teams' does not have a value"),
    "a rung too few": (lambda value: value["rungs"].pop(), "a value for each of 2 rungs"),
    "a rung twice": (lambda value: value["rungs"].__setitem__(1, value["rungs"][0]), "is listed twice"),
    "no number": (lambda value: _first(value)["divergences"].__setitem__(0, float("nan")), "divergences.0"),
    "endless": (lambda value: _first(value)["divergences"].__setitem__(0, float("inf")), "divergences.0"),
    "negative": (lambda value: _first(value)["residuals"].__setitem__(0, -0.1), "residuals.0"),
    "a number as text": (lambda value: _first(value)["divergences"].__setitem__(0, "0.1"), "divergences.0"),
    "a count that is none": (lambda value: _first(value)["sources"].__setitem__(3, 1.5), "sources.3"),
    "a workload without pairs": (lambda value: value["workloads"].update(more=[]), "workloads.more"),
    "a share above 1": (lambda value: value["rungs"][0].update(share=1.5), "rungs.0.share"),
    "head weights without end": (lambda value: value.update(head_weights=[float("inf")]), "head_weights.0"),
    "no model": (lambda value: value.pop("model"), "model"),
    "an unknown field": (lambda value: value.update(modle="x"), "modle"),
    "an earlier format": (lambda value: value.update(format=0), "format"),
    "a format that is no number": (lambda value: value.update(format="1"), "format"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_fields_are_named(damage: str, file: Path) -> None:
    change, why = DAMAGES[damage]
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    with pytest.raises(AnchorFileCorrupt, match=rf"{FILE} does not fit the format of priors: .*{why}"):
        read_prior(file)


def test_what_is_no_json_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{")
    with pytest.raises(AnchorFileCorrupt, match="a is not a JSON file"):
        read_prior(tmp_path / "a")
    with pytest.raises(AnchorFileError, match="nowhere cannot be read"):
        read_prior(tmp_path / "nowhere")


def test_pairs_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    """A pair that lacks a rung would say nothing about the ladder, and take the place of one that does."""
    short = Pair({RUNGS[0]: Measured(0.1)})
    for pairs in ({"a": (pair(1), short)}, {"a": (short,), "b": (pair(1),)}, {"a": (pair(1),), "empty": ()}):
        with pytest.raises(InvalidRequest, match="cannot be part of a prior"):
            write_prior(Prior(MODEL, pairs), tmp_path / FILE, name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(AnchorFileError, match="cannot be written: No space left on device"):
        write_prior(prior().without("teams"), file, name="tiny")
    assert file.read_bytes() == before


def test_the_one_for_a_model_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shipped_priors", lambda: iter([file]))
    assert find_prior(MODEL) == prior()
    assert find_prior("cd" * 32) is None


def test_what_ships_can_be_read() -> None:
    """Files beside this code, whichever there are."""
    found = list(shipped_priors())
    assert found == sorted((ROOT / "kvcomm" / "anchors").glob(f"*/{FILE}"))
    for each in found:
        shipped = read_prior(each)
        assert all(shipped.pairs.values())
        assert {rung.estimator for pair in shipped.all_pairs for rung in pair.measured} <= {"rotate"}


def test_the_folder_of_the_package_is_the_one_of_the_repository() -> None:
    link = ROOT / "kvcomm" / "anchors"
    assert (link.is_symlink(), os.readlink(link)) == (True, "../anchors")
    assert list(link.glob("*/*.json"))


BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
FIND = "from kvcomm.align.prior import shipped_priors; print(*shipped_priors())"


def _built(source: Path, kind: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_has_the_files_and_finds_them(tmp_path: Path) -> None:
    """Built from the source tree, and once more from the source distribution."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kvcomm", "anchors", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    write_prior(prior(), source / "anchors" / "tiny" / FILE, name="tiny")
    shipped = {f"kvcomm/{file.relative_to(source)}" for file in (source / "anchors").glob("*/*.*")}
    packed = _built(source, "build_sdist", tmp_path / "sdist")
    subprocess.run(["tar", "xzf", str(packed), "-C", str(tmp_path / "sdist")], check=True)
    unpacked = packed.with_name(packed.name.removesuffix(".tar.gz"))
    for number, tree in enumerate((source, unpacked)):
        wheel = _built(tree, "build_wheel", tmp_path / f"wheel {number}")
        with zipfile.ZipFile(wheel) as archive:
            held = {name for name in archive.namelist() if name.startswith("kvcomm/anchors/")}
            archive.extractall(tmp_path / f"installed {number}")
        assert held == shipped
        found = subprocess.run(
            [sys.executable, "-c", FIND],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / f"installed {number}")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert str(tmp_path / f"installed {number}" / "kvcomm" / "anchors" / "tiny" / FILE) in found.stdout
