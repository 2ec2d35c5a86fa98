"""The profiles that are part of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcomm.agents.team import load_team
from kvcomm.agents.tuning.answers import greedy, team_digest
from kvcomm.agents.tuning.profile import read_profile

PROFILES = sorted((Path(__file__).parents[3] / "anchors").glob("*/*.toml"))


def test_there_are_profiles_of_two_teams() -> None:
    assert [file.stem for file in PROFILES] == ["gsm8k", "mmlu"]


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_a_shipped_profile_is_of_the_packaged_team_and_holds(file: Path) -> None:
    """A changed prompt is another team: whoever changes one has to tune anew."""
    profile = read_profile(file)
    assert (profile.team.name, profile.model.name) == (file.stem, file.parent.name)
    assert profile.team.digest == team_digest(greedy(load_team(file.stem)))
    assert profile.verification.holds
    assert profile.verification.accepted > 0
