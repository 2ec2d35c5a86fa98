"""The profiles that are part of this repository: of teams as they are, without banks, and of use at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvcomm.agents.example_runs import examples
from kvcomm.agents.team import Team, load_team
from kvcomm.agents.tuning import apply_profile
from kvcomm.agents.tuning.answers import greedy, team_digest
from kvcomm.agents.tuning.profile import pairs_file, read_pairs, read_profile
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.model.loading import LoadedModel

ANCHORS = Path(__file__).parents[3] / "anchors"
PROFILES = sorted(ANCHORS.glob("*/*.toml"))
MOST_BYTES = 8 * 2**20
"""Of all that ships."""


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_a_shipped_profile_is_of_the_packaged_team_and_holds(file: Path) -> None:
    """A changed prompt is another team: whoever changes one has to tune anew."""
    profile = read_profile(file)
    assert (profile.team.name, profile.model.name) == (file.stem, file.parent.name)
    assert profile.team.digest == team_digest(greedy(load_team(file.stem)))
    for found in profile.verification.values():
        assert found.holds
    assert profile.verification["rotate"].accepted > 0
    known = {reader.digest: len(pairs) for reader, pairs in read_pairs(profile, file).readers}
    assert {each.reader for each in profile.agents.values()} <= known.keys()
    assert pairs_file(file).stat().st_size + file.stat().st_size < MOST_BYTES / 8


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_a_shipped_profile_moves_text_in_the_first_run(smollm2: LoadedModel, file: Path) -> None:
    """Bug: it could be used by nobody, since the banks that it needed were not shipped."""
    packaged = load_team(file.stem)
    short = tuple(
        replace(agent, sampling=replace(agent.sampling, max_new_tokens=16))
        for agent in packaged.agents
        if agent.sampling is not None
    )
    (inputs, *_) = examples(packaged)

    def make(config: EngineConfig) -> Engine:
        model, tokenizer = smollm2.model, smollm2.tokenizer
        return Engine(model, tokenizer, config=config, weights_id=smollm2.weights_digest)

    applied = apply_profile(make, file, team=packaged)
    with applied.engine as engine:
        result = (
            Team("short", short).group(engine, policy=applied.policy, read_along=False).run(**packaged.inputs, **inputs)
        )
        moved = [answer.usage.aligned_tokens for answer in result.values()]
    assert not applied.has_banks
    assert sum(moved) > 0
