"""One attempt to serve a request on moved KV: a state machine from the plan to the first token.

    planned -> looking -> computing -> accepted
       |          |         |  ^
       |          |         +--+  a safer rung, while recomputed tokens are too far off
       +----------+---------+----> retreated: everything is computed

An attempt says what is to be computed next (`ToCompute`); whoever drives it changes the request and its sequence
accordingly. It writes nothing but moved KV into the sequence's own pages, while it is assembled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch

from kvcomm.align.attention_mass import AttentionMass, looking_layers, looking_rows
from kvcomm.align.estimators import Correction, Written
from kvcomm.align.importance import importance
from kvcomm.align.ladder import Rung, moved_positions
from kvcomm.align.moves import Move, num_moved
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.probes import Probes
from kvcomm.align.readers import Reader
from kvcomm.memory.memory import Memory
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import Run, ScoreWatch
from kvcomm.reuse.choosing import Chooser, View
from kvcomm.reuse.decision import Acceptance
from kvcomm.reuse.finder import parts_of
from kvcomm.reuse.plan import ApproximationReport, Part, Plan, Reason, plan_of
from kvcomm.reuse.replay import NOTHING, assemble
from kvcomm.reuse.stretches import computed_stretches, rung_stretches

logger = logging.getLogger("kvcomm.engine")


class Stage(StrEnum):
    """Where an attempt is."""

    PLANNED = "planned"
    LOOKING = "looking"
    COMPUTING = "computing"
    ACCEPTED = "accepted"
    RETREATED = "retreated"


class ToCompute(NamedTuple):
    """What is to be computed next.

    Attributes:
        plan: of the whole prompt, as far as it is known by now.
        stretches: `[start, end)` of it, ascending.
        num_counted: leading tokens that count as computed until all of that is done.
        moved_from: first position of moved KV; None: none is left, everything behind the exact prefix is computed.
    """

    plan: Plan
    stretches: tuple[tuple[int, int], ...]
    num_counted: int
    moved_from: int | None


@dataclass(frozen=True, eq=False)
class AttemptTools:
    """What attempts of one engine work with. `choosers` by name."""

    memory: Memory
    layers: Sequence[LayerStore]
    choosers: Mapping[str, Chooser]


@dataclass(frozen=True)
class TargetPrompt:
    """The prompt that text is moved into.

    Attributes:
        otherwise, unmoved: why template text, and why text of segments that are not moved, is computed.
        is_displaced: the first slot is not moved for a reason of its own.
        back_until: nor are slots that begin before this position, see `beginnings`.
    """

    segments: tuple[Segment, ...]
    num_tokens: int
    num_exact: int
    otherwise: Reason
    unmoved: Reason
    is_displaced: bool = False
    back_until: int = 0

    def parts(self, moved: Sequence[tuple[int, int]]) -> list[Part]:
        """What there is to say about it, behind its exact prefix."""
        return parts_of(
            self.segments,
            self.num_exact,
            moved,
            otherwise=self.otherwise,
            unmoved=self.unmoved,
            is_displaced=self.is_displaced,
            back_until=self.back_until,
        )


class _Choice(NamedTuple):
    """The moved tokens that a rung computes, and their estimates."""

    positions: IntArray
    probes: Probes


class Attempt:
    """How one request reuses moved KV.

    Attributes:
        moves: what is moved; holds the pages of their sources until it is released.
        distance: of the text from what is known; known when it is assembled.
        residual: of the recomputed tokens; known when they are computed.
    """

    def __init__(
        self,
        tools: AttemptTools,
        prompt: TargetPrompt,
        reader: Reader,
        moves: Sequence[Move],
        corrections: Sequence[Correction],
        wanted: Acceptance | Rung,
        head_weights: Sequence[float] | None,
    ) -> None:
        """Make one.

        Args:
            corrections: one per move.
            wanted: on what grounds it is served; or a rung to serve at with no bound.
        """
        self.prompt = prompt
        self.reader = reader
        self.moves = tuple(moves)
        self.stage = Stage.PLANNED
        self.holds_sources = True
        self.distance = 0.0
        self.residual: float | None = None
        self.acceptance = wanted if isinstance(wanted, Acceptance) else None
        self._forced = wanted if isinstance(wanted, Rung) else None
        self._tools = tools
        self._corrections = tuple(corrections)
        self._head_weights = head_weights
        self._written: Written | None = None
        self._looking: AttentionMass | None = None
        self._view: View | None = None
        self._choices: dict[Rung, _Choice] = {}
        self._is_spoiled = False

    @property
    def rung(self) -> Rung:
        """The one it is at."""
        if self._forced is not None:
            return self._forced
        assert self.acceptance is not None
        return self.acceptance.rung

    @property
    def is_accepted(self) -> bool:
        """Whether the answer stands on its moved KV."""
        return self.stage is Stage.ACCEPTED

    @property
    def risk(self) -> float:
        """Nats of divergence to be expected of this KV at most: its own and its sources', which adds up."""
        predicted = math.inf if self.acceptance is None else self.acceptance.predicted
        return predicted + max(move.risk for move in self.moves)

    @property
    def num_recomputed(self) -> int:
        """Moved tokens that the rung computes at most."""
        return int(self.rung.share * num_moved(self.moves))

    @property
    def plan(self) -> Plan:
        """The plan as far as it is known by now."""
        return self._plan(Reason.RUNG)

    def report(self) -> ApproximationReport:
        """For the request's usage."""
        rung = self.rung
        return ApproximationReport(self.reader.digest, str(rung), rung.share, self.risk, self.distance, self.residual)

    def assemble(self, sequence: KVSequence) -> None:
        """Write the moved KV into a sequence's own pages. Not under the lock: nobody else looks at these."""
        assert self.stage is Stage.PLANNED, self.stage
        tools, chooser = self._tools, self._chooser
        self._view = View(self.moves, self.prompt.num_exact, sequence)
        positions = {} if chooser.looks or not self.num_recomputed else self._positions()
        with_errors = chooser.looks and self.num_recomputed > 0
        self._written = assemble(
            tools.memory, tools.layers, sequence, self.moves, self._corrections, with_errors=with_errors
        )
        self.distance = self._written.distance
        self._choices = self._with_estimates(positions)

    def begin(self) -> ToCompute:
        """Behind `assemble`: what the first pass computes, or everything if the text is too far off."""
        assert self._written is not None, self.stage
        if self.acceptance is not None and not self.acceptance.is_like(self.distance):
            return self.retreat(Reason.OUT_OF_DISTRIBUTION)
        if self.num_recomputed and self._chooser.looks:
            # The first pass, over glue and tail, looks at what the tail attends to.
            layers, rows = self._tools.layers, looking_rows(self.moves[-1].end, self.prompt.num_tokens)
            self._looking = AttentionMass(layers, looking_layers(len(layers)), *rows)
            self.stage = Stage.LOOKING
        else:
            self.stage = Stage.COMPUTING
        plan = self.plan
        return ToCompute(plan, plan.stretches, self.prompt.num_exact, self.moves[0].start)

    def watch(self, run: Run, row: int) -> ScoreWatch | None:
        """What looks on while rows from `row` on of a pass compute a run of the prompt."""
        if self._looking is None:
            return None
        return self._looking.watch(self._tools.memory.pool.slots(run.pages, run.end), row, run.start, run.end)

    def spoil(self, error: Exception) -> None:
        """What looks on has failed: the pass goes on, and behind it everything is computed."""
        logger.error("looking on while KV is moved failed: %r", error, exc_info=error)
        self._is_spoiled = True

    def advance(self) -> ToCompute | None:
        """Behind a pass: what is to be computed next; None: the answer may begin."""
        if self._is_spoiled:
            return self.retreat(Reason.FAILED)
        if self.stage is Stage.LOOKING:
            self._score()
            self._choices = self._with_estimates(self._positions())
            self.stage = Stage.COMPUTING
            return self._climb(Reason.RUNG)
        assert self.stage is Stage.COMPUTING, self.stage
        choice = self._choices.get(self.rung)
        if choice is not None:
            self.residual = choice.probes.residual()
        if self.acceptance is None or self.acceptance.holds(self.residual):
            self.stage = Stage.ACCEPTED
            return None
        return self._climb(Reason.ESCALATED) if self.acceptance.escalate() else self.retreat(Reason.ESCALATED)

    def retreat(self, reason: Reason) -> ToCompute:
        """Give up: everything behind the exact prefix is computed."""
        self.stage = Stage.RETREATED
        self._looking = None
        self._choices = {}
        num_exact, num_tokens = self.prompt.num_exact, self.prompt.num_tokens
        plan = plan_of(num_exact, [Part(num_exact, num_tokens, reason)])
        return ToCompute(plan, plan.stretches, num_exact, None)

    @property
    def _chooser(self) -> Chooser:
        return self._tools.choosers[self.rung.chooser]

    def _score(self) -> None:
        assert self._looking is not None
        assert self._written is not None
        assert self._view is not None
        assert self._written.errors is not None
        attention = self._looking.by_head(torch.from_numpy(moved_positions(self.moves)).long())
        scores = importance(attention, self._written.errors, self._head_weights)
        self._view = self._view._replace(scores=scores)
        self._looking = None

    def _positions(self) -> dict[Rung, IntArray]:
        """What the rung, and every safer one that may be tried behind it, computes of the moved tokens."""
        assert self._view is not None
        choosers = self._tools.choosers
        return {rung: choosers[rung.chooser].choose(self._view, rung.share) for rung in self._rungs}

    def _with_estimates(self, positions: Mapping[Rung, IntArray]) -> dict[Rung, _Choice]:
        """Their estimates are taken together: a safer rung computes tokens that one before it has overwritten."""
        assert self._view is not None
        pool, layers, pages = self._tools.memory.pool, self._tools.layers, self._view.sequence.pages
        chosen = ((rung, each) for rung, each in positions.items() if len(each))
        return {rung: _Choice(each, Probes(pool, layers, pages, each)) for rung, each in chosen}

    @property
    def _rungs(self) -> tuple[Rung, ...]:
        """The one it is at and those that are tried behind it, in this order."""
        return (self.rung,) if self.acceptance is None else self.acceptance.ladder[self.acceptance.index :: -1]

    def _climb(self, reason: Reason) -> ToCompute:
        """Compute the tokens of the rung, for a reason, and what stands behind all moved text once more."""
        stretches = rung_stretches(self.moves, self._choices[self.rung].positions, self.prompt.num_tokens)
        # Nothing behind the first moved token counts before the rung is computed: a fork must not take it along.
        return ToCompute(self._plan(reason), tuple(stretches), self.moves[0].start, self.moves[0].start)

    def _plan(self, reason: Reason) -> Plan:
        """`reason`: why moved tokens are computed after all."""
        prompt = self.prompt
        moved = [(move.start, move.end) for move in self.moves]
        parts = prompt.parts(moved)
        choice = self._choices.get(self.rung)
        recomputed = NOTHING if choice is None else choice.positions
        return plan_of(prompt.num_exact, _with_rung(parts, recomputed, reason))


def passes_of(moves: Sequence[Move], share: float, num_tokens: int) -> list[list[tuple[int, int]]]:
    """What is computed pass by pass, as far as that can be told before it is known which tokens a rung takes."""
    positions = moved_positions(moves)
    count = int(share * len(positions))
    passes = [computed_stretches(moves, NOTHING, num_tokens)]
    if count:
        spread = positions[np.linspace(0, len(positions) - 1, count).astype(np.int64)]
        passes.append(rung_stretches(moves, spread, num_tokens))
    return passes


def _with_rung(parts: Iterable[Part], recomputed: IntArray, why: Reason) -> Iterator[Part]:
    """Cut out of the moved parts what a rung recomputes."""
    wanted = frozenset(recomputed.tolist())
    for part in parts:
        if part.reason is not None:
            yield part
            continue
        start = part.start
        for position in range(part.start, part.end):
            reason = why if position in wanted else None
            following = why if position + 1 in wanted else None
            if position + 1 == part.end or following != reason:
                yield Part(start, position + 1, reason)
                start = position + 1
