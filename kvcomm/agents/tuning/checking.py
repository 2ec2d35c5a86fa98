"""Profiles in use: taking one over, and whether its bound still holds on rows it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kvcomm.agents.team import Team
from kvcomm.agents.tuning.answers import exact_runs, greedy, team_digest
from kvcomm.agents.tuning.profile import (
    BANKS,
    TuningProfile,
    VerificationTable,
    read_profile,
    require_fit,
    state_folder,
)
from kvcomm.agents.tuning.replays import EngineMaker, Measured, Replays, measure
from kvcomm.agents.tuning.rows import Row
from kvcomm.agents.warming import Note
from kvcomm.align.calibration import Calibration
from kvcomm.align.intervals import violation_limit, wilson
from kvcomm.align.serving import serve
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.engine.policy import ReusePolicy
from kvcomm.engine.variant import Variant
from kvcomm.errors import AnchorFileCorrupt, InvalidRequest


class Applied(NamedTuple):
    """An engine under a profile, and the policy by which its requests are served."""

    engine: Engine
    policy: ReusePolicy
    profile: TuningProfile


class Check(NamedTuple):
    """What new rows say; `num_known` rows were left out because the profile has seen them."""

    found: VerificationTable
    num_rows: int
    num_known: int


def apply_profile(
    make_engine: EngineMaker, file: Path, *, team: Team | None = None, config: EngineConfig | None = None
) -> Applied:
    """Make an engine with a profile's settings and load its banks and calibrations.

    Args:
        make_engine: given the settings; such as `lambda config: Engine.load("smollm2-135m", config=config)`.
        team: if given, it has to be the one that the profile was made for.
        config: everything that profiles do not speak of.

    Raises:
        AnchorFileForeign: made for another model or team.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: profile or banks are damaged, newer, unreadable.
    """
    profile = read_profile(file)
    engine = make_engine(profile.config(config))
    try:
        digest = None if team is None else team_digest(greedy(team))
        require_fit(profile, file, engine.namespace(), digest)
        engine.load_anchors(state_folder(file) / BANKS)
    except BaseException:
        engine.close()
        raise
    return Applied(engine, profile.policy(), profile)


def check_profile(make_engine: EngineMaker, file: Path, team: Team, rows: list[Row], folder: Path, note: Note) -> Check:
    """Run the team on rows that the profile has not seen, replay them, and judge what would be accepted.

    Args:
        folder: for exact runs and outcomes, from which an interrupted check goes on.

    Raises:
        InvalidRequest: every row is known to the profile.
        AnchorFileError: see `apply_profile`.
    """
    applied = apply_profile(make_engine, file, team=team)
    profile = applied.profile
    with applied.engine as engine:
        fresh = [row for row in rows if row.digest not in profile.data.used]
        if not fresh:
            raise InvalidRequest(f"all {len(rows)} rows were used to make {file}; give --data with others")
        runs = exact_runs(engine, greedy(team), fresh, folder / "answers.jsonl", note)
        calibrations, strengths = _calibrations(engine, profile, file)
        # A change of the profile makes other outcomes: their label says whose they are.
        label = f"check {profile.validity.made}"
        variants = ladder_variants(applied.policy)
        measured = measure(engine, Replays(fresh, runs), variants, strengths, folder / "outcomes.jsonl", label, note)
        found = judge(measured, calibrations, applied.policy, num_requests=len(fresh) * (len(team.agents) - 1))
    return Check(found, len(fresh), len(rows) - len(fresh))


def ladder_variants(policy: ReusePolicy) -> list[Variant]:
    """Every rung of a policy."""
    return [Variant(policy.estimator, share) for share in policy.rungs]


def judge(
    measured: Measured, calibrations: Mapping[str, Calibration], policy: ReusePolicy, *, num_requests: int
) -> VerificationTable:
    """What would have been accepted, and how often that was wrong; agents without calibration are served exactly."""
    epsilon, delta = policy.max_divergence, policy.delta
    answered = [
        serve(calibrations[agent], prompt, epsilon, delta)
        for agent, prompts in measured.items()
        if agent in calibrations
        for prompt in prompts
    ]
    served = [each for each in answered if each is not None]
    violations = sum(each.divergence > epsilon for each in served)
    interval, limit = wilson(violations, len(served)), violation_limit(delta, len(served))
    return VerificationTable(
        requests=num_requests,
        accepted=len(served),
        violations=violations,
        share=interval.value,
        low=interval.low,
        high=interval.high,
        limit=limit,
        aligned=sum(each.num_aligned for each in served) / max(1, sum(each.num_moved for each in served)),
        holds=interval.value <= limit,
    )


def _calibrations(
    engine: Engine, profile: TuningProfile, file: Path
) -> tuple[dict[str, Calibration], dict[str, float]]:
    groups = {group.key.digest: group for group in engine.edge_groups()}
    missing = [agent for agent, each in profile.agents.items() if each.group not in groups]
    if missing:
        raise AnchorFileCorrupt(f"{file}: its banks hold no calibration for {', '.join(missing)}; tune anew")
    known = {agent: groups[each.group] for agent, each in profile.agents.items()}
    return (
        {agent: group.calibration for agent, group in known.items()},
        {agent: group.strength for agent, group in known.items()},
    )
