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
    TuningProfile,
    VerificationTable,
    fitting_banks,
    read_pairs,
    read_profile,
    require_fit,
)
from kvcomm.agents.tuning.replays import EngineMaker, MeasuredPrompts, Replays, measure
from kvcomm.agents.tuning.rows import Row
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration
from kvcomm.align.intervals import violation_limit, wilson
from kvcomm.align.ladder import TURNED, Ladder
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Level
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.decision import serve
from kvcomm.reuse.policy import ReusePolicy

BATCH = 8
"""Rows of a check that are answered at the same time; fewer keep a budget better, more are quicker."""


class Applied(NamedTuple):
    """An engine under a profile, and the policy by which its requests are served.

    Attributes:
        has_banks: whether anchors came with it; else text is moved by rungs that need none, and anchors are learned.
    """

    engine: Engine
    policy: ReusePolicy
    profile: TuningProfile
    has_banks: bool


class LadderCheck(NamedTuple):
    """What `num_rows` new rows say of the ladder that requests are served by.

    Attributes:
        ladder: its estimator.
        num_known: rows left out because the profile has seen them.
        num_unread: rows left out because the time was over.
    """

    ladder: str
    found: VerificationTable
    num_rows: int
    num_known: int
    num_unread: int


def apply_profile(
    make_engine: EngineMaker, file: str | Path, *, team: Team | None = None, config: EngineConfig | None = None
) -> Applied:
    """Make an engine with a profile's settings, what is known of the team's readers, and its banks if there are any.

    Args:
        make_engine: given the settings; such as `lambda config: Engine.load("smollm2-135m", config=config)`.
        team: if given, it has to be the one that the profile was made for.
        config: everything that profiles do not speak of.

    Raises:
        AnchorFileForeign: made for another model or team.
        AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: profile, pairs or banks are damaged, newer, unreadable.
    """
    file = Path(file)
    profile = read_profile(file)
    engine = make_engine(profile.config(config))
    try:
        namespace = engine.namespace()
        require_fit(profile, file, namespace, None if team is None else team_digest(greedy(team)))
        banks = fitting_banks(profile, file)
        if banks is not None:
            engine.reuse.load(banks)
        else:
            known = read_pairs(profile, file)
            with engine.lock:
                engine.reuse.parts.book.put(namespace, known)
    except BaseException:
        engine.close()
        raise
    return Applied(engine, profile.policy(), profile, banks is not None)


def check_profile(
    make_engine: EngineMaker,
    file: str | Path,
    team: Team,
    rows: list[Row],
    folder: str | Path,
    note: Note,
    *,
    budget_s: float = math.inf,
) -> LadderCheck:
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
        ladder = _served_by(applied)
        readers = {agent: Reader(each.reader) for agent, each in profile.agents.items()}
        known = calibrations(engine, readers, ladder, applied.policy)
        # A change of the profile makes other outcomes: their label says whose they are.
        label = f"check {profile.validity.made}"
        measured: MeasuredPrompts = {}
        num_read = 0
        for batch in _batches_within(fresh, budget_s, note):
            runs = exact_runs(engine, greedy(team), batch, folder / "answers.jsonl", note)
            found = measure(engine, Replays(batch, runs), ladder, folder / "outcomes.jsonl", label, note)
            for agent, prompts in found.items():
                measured.setdefault(agent, []).extend(prompts)
            num_read += len(batch)
        num_requests = num_read * (len(team.agents) - 1)
        judged = judge(measured, known, ladder, profile.policy().bound, num_requests=num_requests)
    return LadderCheck(ladder[0].estimator, judged, num_read, len(rows) - len(fresh), len(fresh) - num_read)


def _served_by(applied: Applied) -> Ladder:
    """The ladder of a profile's first requests: the first one that there are anchors for, if it needs any."""
    free = TURNED[0].estimator
    for ladder in applied.policy.ladders:
        if applied.has_banks or ladder[0].estimator == free:
            return ladder
    raise InvalidRequest("the profile has no ladder that needs no anchors, and its banks are not there; tune anew")


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


def calibrations(
    engine: Engine, readers: Mapping[str, Reader], ladder: Ladder, policy: ReusePolicy
) -> dict[str, Calibration]:
    """By what each agent's requests would be decided along a ladder; agents of whom too little is known have none.

    The prior is none of what was tuned, so it does not count.
    """
    assert policy.bound is not None
    levels = [level for level in policy.levels if level is not Level.PRIOR]
    found = {}
    with engine.lock:
        for agent, reader in readers.items():
            grounds = engine.reuse.parts.book.grounds(engine.namespace(), reader, (ladder,), policy.bound, levels)
            if grounds is not None:
                found[agent] = grounds.calibration
    return found


def judge(
    measured: MeasuredPrompts,
    known: Mapping[str, Calibration],
    ladder: Ladder,
    bound: Bound | None,
    *,
    num_requests: int,
) -> VerificationTable:
    """What would have been accepted along a ladder, and how often that was wrong.

    Agents without a calibration, and prompts that could not be measured, are computed exactly.
    """
    assert bound is not None
    answered = [
        serve(known[agent], along, bound)
        for agent, prompts in measured.items()
        if agent in known
        for prompt in prompts
        if (along := prompt.along(ladder)) is not None
    ]
    served = [each for each in answered if each is not None]
    violations = sum(each.divergence > bound.max_divergence for each in served)
    interval, limit = wilson(violations, len(served)), violation_limit(bound.delta, len(served))
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
