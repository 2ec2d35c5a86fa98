"""What one row costs: timed on the first rows of the run. Their answers are kept, so they are not answered twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from kvcomm.agents.example_runs import Note
from kvcomm.agents.team import Team
from kvcomm.agents.tuning.answers import exact_runs
from kvcomm.agents.tuning.plan import SAMPLE, Costs
from kvcomm.agents.tuning.replays import Replays, learn, replayed
from kvcomm.agents.tuning.rows import Row
from kvcomm.align.ladder import TURNED, Rung
from kvcomm.engine.engine import Engine

FEW = [Rung(TURNED[0].estimator, share) for share in (0.3, 0.0)]
MANY = [Rung(TURNED[0].estimator, share) for share in (0.5, 0.3, 0.15, 0.0)]


def measure_costs(engine: Engine, team: Team, sample: Sequence[Row], file: Path, note: Note) -> Costs:
    """Answer a sample, all of it at once as the run will, then teach and replay the first rows of it.

    Answers stay in the file, what was taught is forgotten with the engine.
    """
    file.unlink(missing_ok=True)  # of an interrupted sample: what is read instead of answered costs nothing
    begun = time.perf_counter()
    runs = exact_runs(engine, team, sample, file, note)
    answered = time.perf_counter()
    data = Replays(sample[:SAMPLE], runs[:SAMPLE])
    count = len(data.rows)
    learn(engine, data, note)
    learned = time.perf_counter()
    few = _replay_s(engine, data, FEW)
    many = _replay_s(engine, data, MANY)
    replay = max(0.0, many - few) / (len(MANY) - len(FEW)) / count
    return Costs(
        answer=(answered - begun) / len(sample),
        learn=(learned - answered) / count,
        publish=max(0.0, few / count - len(FEW) * replay),
        replay=replay,
        sample=time.perf_counter() - begun,
        num_answered=len(sample),
    )


def _replay_s(engine: Engine, data: Replays, rungs: Sequence[Rung]) -> float:
    begun = time.perf_counter()
    for run in data.runs:
        replayed(engine, run, rungs)
    return time.perf_counter() - begun
