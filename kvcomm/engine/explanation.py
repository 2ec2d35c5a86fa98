"""What a request would find, told without making it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm.plain import Plain
from kvcomm.reuse.plan import Plan, SpanKind


@dataclass(frozen=True)
class Explanation(Plain):
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

    def __repr__(self) -> str:
        tokens = {kind: self.plan.num_tokens(kind) for kind in SpanKind}
        rung = "" if self.rung is None else f", rung {self.rung:g}"
        times = "not measured yet"
        if self.prefill_s is not None and self.cold_s is not None:
            times = f"{self.prefill_s:.3g} s instead of {self.cold_s:.3g} s"
        return (
            f"Explanation({tokens[SpanKind.EXACT]} exact + {tokens[SpanKind.ALIGNED]} aligned + "
            f"{tokens[SpanKind.COMPUTE]} computed{rung}, {times})"
        )
