"""Profiles in use: taking one over, and whether its bound still holds on rows it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kvcomm.agents.example_runs import Note
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
from kvcomm.align.calibration import Calibration
from kvcomm.align.intervals import violation_limit, wilson
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import AnchorFileCorrupt, InvalidRequest
from kvcomm.lab.variant import Variant
from kvcomm.reuse.decision import serve
from kvcomm.reuse.policy import ReusePolicy

BATCH = 8
"""Rows of a check that are answered at the same time; fewer keep a budget better, more are quicker."""


class Applied(NamedTuple):
    """An engine under a profile, and the policy by which its requests are served."""

    engine: Engine
    policy: ReusePolicy
    profile: TuningProfile


class Check(NamedTuple):
    """What `num_rows` new rows say.

    Attributes:
        num_known: rows left out because the profile has seen them.
        num_unread: rows left out because the time was over.
    """

    found: VerificationTable
    num_rows: int
    num_known: int
    num_unread: int


def apply_profile(
    make_engine: EngineMaker, file: str | Path, *, team: Team | None = None, config: EngineConfig | None = None
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
    file = Path(file)
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


def check_profile(
    make_engine: EngineMaker,
    file: str | Path,
    team: Team,
    rows: list[Row],
    folder: str | Path,
    note: Note,
    *,
    budget_s: float = math.inf,
) -> Check:
    """Run the team on rows that the profile has not seen, replay them, and judge what would be accepted.

    Args:
        rows: in an order that tells nothing about them, as `read_rows` gives them: the first ones are used.
        folder: for exact runs and outcomes, from which an interrupted check goes on.
        budget_s: no batch of rows is begun that would take longer than what is left of it; the first one always is.

    Raises:
        InvalidRequest: every row is known to the profile.
        AnchorFileError: see `apply_profile`.
    """
    file, folder = Path(file), Path(folder)
    applied = apply_profile(make_engine, file, team=team)
    profile = applied.profile
    with applied.engine as engine:
        fresh = [row for row in rows if row.digest not in profile.data.used]
        if not fresh:
            raise InvalidRequest(f"all {len(rows)} rows were used to make {file}; give --data with others")
        calibrations, strengths = _calibrations(engine, profile, file)
        # A change of the profile makes other outcomes: their label says whose they are.
        label = f"check {profile.validity.made}"
        variants = ladder_variants(applied.policy)
        measured: Measured = {}
        num_read = 0
        for batch in _batches_within(fresh, budget_s, note):
            runs = exact_runs(engine, greedy(team), batch, folder / "answers.jsonl", note)
            replays = Replays(batch, runs)
            found = measure(engine, replays, variants, strengths, folder / "outcomes.jsonl", label, note)
            for agent, prompts in found.items():
                measured.setdefault(agent, []).extend(prompts)
            num_read += len(batch)
        judged = judge(measured, calibrations, applied.policy, num_requests=num_read * (len(team.agents) - 1))
    return Check(judged, num_read, len(rows) - len(fresh), len(fresh) - num_read)


def _batches_within(rows: Sequence[Row], budget_s: float, note: Note) -> Iterator[Sequence[Row]]:
    """Rows by batches, as long as there is time for one that takes as long as the longest so far."""
    deadline_s, longest_s = time.monotonic() + budget_s, 0.0
    for first in range(0, len(rows), BATCH):
        begun_s = time.monotonic()
        if first and begun_s + longest_s > deadline_s:
            note(f"the budget is used up: {first} of {len(rows)} rows are checked; --budget gives more")
            return
        batch = rows[first : first + BATCH]
        note(f"rows {first + 1} to {first + len(batch)} of {len(rows)}")
        yield batch
        longest_s = max(longest_s, time.monotonic() - begun_s)


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
