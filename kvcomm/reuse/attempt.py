"""What the engine knows about one request that reuses moved KV, from the decision to the first token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvcomm.align.attention_mass import AttentionMass
from kvcomm.align.estimators import Correction
from kvcomm.align.groups import EdgeGroup
from kvcomm.align.ladder import top_segments, top_tokens
from kvcomm.align.moves import Move, num_moved
from kvcomm.align.probes import Probes
from kvcomm.engine.results import ApproximationReport
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.plan import Reason


@dataclass(eq=False)
class Approximation:
    """How a request reuses moved KV.

    Attributes:
        moves: what is moved; `corrections` in the same order.
        rung: index into the policy's shares.
        errors: [number of moved tokens], expected; known when it is assembled, if anything is to be recomputed.
        looking: at what the prompt's last token attends to, in a first pass over glue and tail; None: not needed, or
            done.
        scores: [number of moved tokens], how much each is worth recomputing; None before that pass.
        predicted: nats; the divergence that calibration expects at most; infinite where nobody knows.
        num_exact: tokens of the exact prefix that was found.
        otherwise, unmoved: why template text, and why text of segments that are not moved, is computed.
        distance: of the text from what is known; known when it is assembled.
        residual: of the recomputed tokens; known when they are computed.
        selector: what chooses the tokens of a rung; only where no bound is kept it may be another than "attention".
        chosen: positions to recompute, where something else than `scores` chooses them.
    """

    moves: tuple[Move, ...]
    corrections: tuple[Correction, ...]
    group: EdgeGroup
    rung: int
    predicted: float
    num_exact: int
    otherwise: Reason = Reason.NEW
    unmoved: Reason = Reason.NO_SOURCE
    errors: Tensor | None = None
    looking: AttentionMass | None = None
    scores: Tensor | None = None
    holds_sources: bool = True
    is_assembled: bool = False
    distance: float = 0.0
    residual: float | None = None
    probes: Probes | None = None
    selector: str = "attention"
    chosen: IntArray | None = None

    @property
    def risk(self) -> float:
        """Nats of divergence to be expected of this KV at most: its own and its sources', which adds up."""
        return self.predicted + max(move.risk for move in self.moves)

    @property
    def recomputed(self) -> IntArray:
        """Positions of moved tokens that the rung recomputes; none before it is known which."""
        if self.chosen is not None:
            return self.chosen
        if self.scores is None:
            return np.empty(0, dtype=np.int32)
        choose = top_segments if self.selector == "influence" else top_tokens
        return choose(self.moves, self.share, self.scores)

    @property
    def is_bounded(self) -> bool:
        """Whether it keeps to a calibrated bound, or gives way to exact computation."""
        return math.isfinite(self.predicted)

    @property
    def num_recomputed(self) -> int:
        """Moved tokens that the rung recomputes."""
        return int(self.share * num_moved(self.moves))

    @property
    def share(self) -> float:
        """Of the moved tokens, that the rung may recompute."""
        return self.group.key.shares[self.rung]

    def report(self) -> ApproximationReport:
        """For the request's usage."""
        return ApproximationReport(self.group.key.digest, self.share, self.risk, self.distance, self.residual)
