"""Profiles as files: what is written is read, and what does not belong together is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcomm.agents.tuning.profile import (
    BANKS,
    fitting_banks,
    pairs_file,
    read_pairs,
    read_profile,
    require_fit,
    state_folder,
)
from kvcomm.align.ladder import Rung
from kvcomm.errors import (
    AnchorFileCorrupt,
    AnchorFileError,
    AnchorFileForeign,
    AnchorFileTooNew,
    AnchorFileTooOld,
    InvalidRequest,
)
from tests.profiles import READER, save_profile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_profile(tmp_path / "two.toml")
    return tmp_path / "two.toml"


def test_what_is_written_is_read(file: Path) -> None:
    profile = read_profile(file)
    assert profile == save_profile(file)
    assert profile.policy().rungs == (
        *(Rung("token", 0.3), Rung("token", 0.0)),
        *(Rung("rotate", 0.5), Rung("rotate", 0.3)),
    )
    assert profile.config().anchor_bytes == 1024


def test_pairs_ship_without_what_needs_anchors(file: Path) -> None:
    knowledge = read_pairs(read_profile(file), file)
    ((reader, pairs),) = knowledge.readers
    assert (reader, reader.targets, reader.slots) == (READER, READER.targets, READER.slots)
    assert [{rung.estimator for rung in pair.measured} for pair in pairs] == [{"rotate"}] * 2
    assert pairs[0].sources.num_tokens == 9
    assert not knowledge.watches


def test_pairs_of_another_profile_are_refused(file: Path) -> None:
    profile, beside = read_profile(file), pairs_file(file)
    value = json.loads(beside.read_text())
    value["readers"][0]["pairs"][0]["measured"][0]["divergence"] = 0.0
    beside.write_text(json.dumps(value))
    with pytest.raises(AnchorFileCorrupt, match="was altered, or belongs to another profile; restore it, or tune anew"):
        read_pairs(profile, file)
    beside.unlink()
    with pytest.raises(AnchorFileError, match=r"copy it beside two\.toml, or tune anew"):
        read_pairs(profile, file)


def test_banks_are_all_there_or_none(file: Path) -> None:
    profile, folder = read_profile(file), state_folder(file) / BANKS
    assert fitting_banks(profile, file) is None
    folder.mkdir(parents=True)
    assert fitting_banks(profile, file) is None
    for name, how in (("x.safetensors", "was altered"), ("y.safetensors", "is missing")):
        (folder / name).write_bytes(b"something")
        with pytest.raises(AnchorFileCorrupt, match=f"bank x.safetensors {how}; restore it, remove .* to go without"):
            fitting_banks(profile, file)
        (folder / name).unlink()


def test_other_models_teams_and_formats_are_refused(file: Path) -> None:
    profile = read_profile(file)
    require_fit(profile, file, "n", "d")
    require_fit(profile, file, "n", None)
    with pytest.raises(AnchorFileForeign, match="another model than this one: 'tiny'"):
        require_fit(profile, file, "m", None)
    with pytest.raises(AnchorFileForeign, match="another team: 'two'"):
        require_fit(profile, file, "n", "e")
    text = file.read_text()
    for number, error, message in (
        (3, AnchorFileTooNew, "has format 3"),
        (1, AnchorFileTooOld, "has format 1.*tune anew"),
    ):
        file.write_text(text.replace("format = 2", f"format = {number}"))
        with pytest.raises(error, match=message):
            read_profile(file)
    file.write_text(text.replace("neighbors = ", "neighbours = "))
    with pytest.raises(AnchorFileCorrupt, match="neighbours"):
        read_profile(file)
    file.write_text(text.replace("rotate = [0.5, 0.3]", "rotate = [0.3, 0.5]"))
    with pytest.raises(AnchorFileCorrupt, match="from the safest to the boldest"):
        read_profile(file)
    with pytest.raises(InvalidRequest, match="must end in"):
        state_folder(Path("two.json"))
