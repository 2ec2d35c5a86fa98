"""How a budget is spent: rows of each part from the measured cost of a row, and what is left for the search.

Calibration and verification come first: with fewer pairs than the confidence needs nothing could ever be accepted.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from pydantic import Field, NonNegativeInt

from kvcomm.agents.tuning import search
from kvcomm.agents.tuning.rows import Sizes
from kvcomm.agents.tuning.state import Kept
from kvcomm.align.calibration import pairs_needed
from kvcomm.errors import InvalidRequest

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SAMPLE = 4
"""Rows that are taught and replayed to measure costs; they are the first anchors."""
MIN_ANCHORS, MIN_TUNING = SAMPLE, 4
MOST = Sizes(anchors=24, tuning=24, calibration=160, verification=160)
NUM_RUNGS = 7
"""Rungs of both ladders that planning assumes."""
MARGIN = 0.9
"""Share of the budget that is planned with."""


class Costs(NamedTuple):
    """Seconds per row.

    Attributes:
        answer: of the team's exact run.
        learn: of reading a run and teaching from it.
        publish: of reading a run and computing the exact sides of its readers.
        replay: of one rung for all readers.
        sample: seconds that it took to find all this out.
        num_answered: rows that were answered meanwhile; their answers are kept.
    """

    answer: float
    learn: float
    publish: float
    replay: float
    sample: float = 0.0
    num_answered: int = 0

    def measured(self, num_rows: int, num_rungs: int) -> float:
        """Seconds of replaying rows."""
        return num_rows * (self.publish + num_rungs * self.replay)


class KeptCosts(Kept):
    """Costs as they are kept, see `Costs`."""

    answer: Seconds
    learn: Seconds
    publish: Seconds
    replay: Seconds
    sample: Seconds = 0.0
    num_answered: NonNegativeInt = 0


class TuningPlan(NamedTuple):
    """What will be done, and what it is predicted to take, seconds."""

    sizes: Sizes
    num_answered: int
    sample_s: float
    answer_s: float
    learn_s: float
    base_s: float
    calibrate_s: float
    verify_s: float
    search_s: float

    @property
    def total_s(self) -> float:
        """All of it; the search may take less."""
        return sum(self[2:])

    def steps(self) -> list[tuple[str, int, float]]:
        """Name, rows and seconds of every step."""
        return [
            ("costs of a row", self.num_answered, self.sample_s),
            ("exact runs", self.sizes.total - self.num_answered, self.answer_s),
            ("fill banks", self.sizes.anchors, self.learn_s),
            ("measure rungs, choose ladders", self.sizes.tuning, self.base_s),
            ("search of k, alpha and sketch layers, at most", self.sizes.tuning, self.search_s),
            ("calibrate", self.sizes.calibration, self.calibrate_s),
            ("verify", self.sizes.verification, self.verify_s),
        ]


def least_sizes(delta: float, num_readers: int) -> Sizes:
    """Rows below which nothing can be accepted, or judged, at this delta.

    Every reader is calibrated by pairs of its own. They are judged together, by requests: twice as many as a single one
    needs, because not every request is accepted.
    """
    needed = pairs_needed(delta)
    return Sizes(MIN_ANCHORS, MIN_TUNING, needed, min(needed, math.ceil(2 * needed / num_readers)))


def make_plan(costs: Costs, num_rows: int, budget_s: float, delta: float, num_readers: int) -> TuningPlan:
    """The largest parts that the budget and the rows allow.

    Args:
        num_readers: agents that read text which can be moved.

    Raises:
        InvalidRequest: too few rows, or too small a budget, for the confidence asked for; with the numbers.
    """
    least = least_sizes(delta, num_readers)
    if num_rows < least.total:
        raise InvalidRequest(
            f"{num_rows} rows are too few: confidence {1 - delta:g} needs {least.calibration} to calibrate, "
            f"{least.verification} to verify, {least.anchors} for anchors and {least.tuning} to tune, "
            f"together {least.total}"
        )
    smallest = _priced(costs, least)
    if smallest.total_s > budget_s:
        raise InvalidRequest(
            f"a budget of {budget_s:.0f} s is too small: confidence {1 - delta:g} needs {least.total} rows at least, "
            f"{least.calibration} of them to calibrate; at {costs.answer:.2f} s per exact run and {costs.replay:.3f} s "
            f"per replay that takes {smallest.total_s:.0f} s; give a larger --budget or a lower --confidence"
        )
    best = smallest
    for step in range(1, 41):
        sizes = Sizes(*(low + (max(low, most) - low) * step // 40 for low, most in zip(least, MOST, strict=True)))
        plan = _priced(costs, sizes)
        if sizes.total > num_rows or plan.total_s > MARGIN * budget_s * 0.75:
            break
        best = plan
    return best._replace(search_s=max(0.0, MARGIN * budget_s - best.total_s))


def _priced(costs: Costs, sizes: Sizes) -> TuningPlan:
    return TuningPlan(
        sizes,
        num_answered=min(sizes.total, costs.num_answered),
        sample_s=costs.sample,
        answer_s=max(0, sizes.total - costs.num_answered) * costs.answer,
        learn_s=sizes.anchors * costs.learn,
        base_s=costs.measured(sizes.tuning, len(search.BASE)),
        calibrate_s=costs.measured(sizes.calibration, NUM_RUNGS),
        verify_s=costs.measured(sizes.verification, NUM_RUNGS),
        search_s=0.0,
    )
