"""What a request would find, told without making it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm.engine.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """The plan that a request would get now, and what it would take.

    Attributes:
        plan: its spans and reasons as they would be at admission. Moved text is given as such whole: which of its
            tokens the rung recomputes, and whether checks make it exact after all, only the passes themselves tell.
        rung: share of the moved tokens that would be recomputed at most; None: nothing would be moved.
        predicted: nats of divergence that calibration expects at most; None: nothing would be moved.
        prefill_s: predicted seconds of its passes up to the first token, on this machine when it does nothing else.
        cold_s: the same with nothing cached. Both None until the machine has been measured, which the first question
            asks for.
    """

    plan: Plan
    rung: float | None = None
    predicted: float | None = None
    prefill_s: float | None = None
    cold_s: float | None = None
