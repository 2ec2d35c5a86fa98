"""Approximate reuse of one engine: what of a prompt is moved, at which rung, and whether it may be trusted.

Decides (`plan`), writes the moved KV (`assemble`), checks it before the first token (`check`), and publishes what was
computed (`publish`). A decision allows moving only when a calibrated rung keeps the caller's bound; whatever goes wrong
on the way ends in computing exactly. Who learns and calibrates is `study`'s matter. Called under the engine's lock but
for `assemble`, which writes only to pages of the request.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from kvcomm.align.attention_mass import AttentionMass, looking_layers
from kvcomm.align.bound import Bound
from kvcomm.align.edges import Edge
from kvcomm.align.estimators import Correction, Estimator
from kvcomm.align.groups import GroupBook, GroupKey
from kvcomm.align.importance import importance
from kvcomm.align.ladder import moved_positions
from kvcomm.align.moves import Move, num_moved
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.probes import Probes
from kvcomm.engine.explanation import Explanation
from kvcomm.engine.request import Request
from kvcomm.lab.forced import DeviationChooser, forced
from kvcomm.lab.variant import Variant
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.runner import Run, Watch
from kvcomm.reuse.attempt import Approximation
from kvcomm.reuse.cost import ReuseCost
from kvcomm.reuse.finder import MoveFinder, parts_of
from kvcomm.reuse.plan import Part, Plan, Reason, plan_of
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import assemble, computed_stretches


class Reuse:
    """The planner of approximate reuse."""

    def __init__(
        self,
        memory: Memory,
        layers: Sequence[LayerStore],
        estimators: Mapping[str, Estimator],
        groups: GroupBook,
        cost: ReuseCost,
        deviation: DeviationChooser,
        *,
        immovable: str | None,
    ) -> None:
        """Args:
        immovable: why this model's keys cannot be moved, or None.
        """
        self.finder = MoveFinder(memory, self._evidence)
        self.estimators = estimators
        self.groups = groups
        self.immovable = immovable
        self._memory = memory
        self._layers = layers
        self._cost = cost
        self._deviation = deviation

    def plan(self, request: Request, otherwise: Reason) -> Plan:
        """The plan of a request whose exact prefix has been found; keeps its approximation, if any, in the request.

        Args:
            otherwise: why what is not cached exactly has to be computed.
        """
        policy, num_exact = request.policy, request.sequence.num_computed
        moves = [] if self.immovable else self._find(request)
        reasons: list[Reason] = []
        for allowed in candidates(moves):
            approximation, reason = self._decide(request, allowed, policy)
            reasons.append(reason)
            if approximation is not None:
                dropped = [move for move in moves if move not in approximation.moves]
                self.finder.release(dropped)
                approximation.otherwise = otherwise
                approximation.unmoved = Reason.SOURCE_RISK if dropped else reason
                request.approximation = approximation
                return self._plan_of(request, approximation)
        self.finder.release(moves)
        # The first one: why not everything is moved that could be.
        reason = reasons[0] if reasons else Reason.IMMOVABLE if self.immovable else Reason.NO_SOURCE
        return plan_of(num_exact, parts_of(request.segments, num_exact, [], otherwise=otherwise, unmoved=reason))

    def explain(self, request: Request) -> Explanation:
        """What there is to say about the plan that a request has got."""
        plan, approximation, cost = request.plan, request.approximation, self._cost.model
        cold = (0, request.num_prompt_tokens)
        cold_s = None if cost is None else cost.compute_s([cold])
        if approximation is None:
            return Explanation(plan, prefill_s=None if cost is None else cost.compute_s(plan.stretches), cold_s=cold_s)
        passes = _passes(approximation.moves, approximation.share, request.num_prompt_tokens)
        prefill_s = None if cost is None else cost.plan_s(passes, num_moved(approximation.moves))
        return Explanation(plan, approximation.share, approximation.risk, prefill_s, cold_s)

    def may_reuse(self, request: Request) -> bool:
        """Whether the request's caller and prompt leave anything to decide."""
        wants = request.variant is not None or not request.policy.is_exact
        return request.reads_cache and wants and any(segment.name is not None for segment in request.segments)

    def prepare(self) -> None:
        """Measure the machine, once; on the engine's thread, not under the lock."""
        self._cost.prepare()

    def waits_for_source(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether a prefill in flight is about to make a segment known that this request would be allowed to move."""
        if self.immovable or not self.may_reuse(request):
            return False
        soon = {
            segment.token_ids
            for other in running
            if not other.is_prefilled and other.namespace == request.namespace
            for segment in other.segments
            if segment.name is not None
        }
        is_read = any(
            segment.name is not None
            and segment.token_ids in soon
            and not self.finder.is_known(request.namespace, segment)
            for segment in request.segments
        )
        return is_read and (
            request.variant is not None
            or any(
                group.calibration.choose(request.policy.max_divergence, request.policy.delta) is not None
                for group in self.groups.groups(request.namespace)
            )
        )

    def assemble(self, request: Request) -> None:
        """Write the moved KV into the request's pages and note how far the text is from what is known."""
        approximation = request.approximation
        assert approximation is not None
        if approximation.selector == "deviation" and approximation.share:
            self._deviation.choose(request, approximation)
        written = assemble(
            self._memory,
            self._layers,
            request.sequence,
            approximation.moves,
            approximation.corrections,
            with_errors=approximation.num_recomputed > 0,
        )
        approximation.distance, approximation.errors = written
        approximation.is_assembled = True

    def accept(self, request: Request) -> None:
        """After `assemble`: go on with the moved KV, or compute everything exactly if the text is too far off."""
        approximation = request.approximation
        assert approximation is not None
        limit = approximation.group.calibration.distance_limit if approximation.is_bounded else sys.float_info.max
        if limit is None or not approximation.distance <= limit:
            self._retreat(request, Reason.OUT_OF_DISTRIBUTION)
            return
        request.sequence.mark_approximate(approximation.moves[0].start)
        request.sequence.num_placed = request.sequence.num_tokens
        if approximation.chosen is not None:
            request.plan = self._plan_of(request, approximation)
            request.pending = list(request.plan.stretches)
        elif approximation.num_recomputed:
            # The first pass, over glue and tail, looks at what the last token attends to.
            end = request.num_prompt_tokens
            approximation.looking = AttentionMass(self._layers, looking_layers(len(self._layers)), end - 1, end)

    def watch(self, request: Request, run: Run, row: int) -> Watch | None:
        """What looks on while rows from `row` on of a pass compute a run of a request's prompt."""
        approximation = request.approximation
        if approximation is None or approximation.looking is None:
            return None
        return approximation.looking.watch(self._memory.pool.slots(run.pages, run.end), row, run.start, run.end)

    def check(self, request: Request) -> bool:
        """After a prefill: whether the answer may begin. If not, a rung, or the next one, is to be computed."""
        approximation = request.approximation
        if approximation is None:
            return True
        if approximation.looking is not None:
            assert approximation.errors is not None
            attention = approximation.looking.by_head(torch.from_numpy(moved_positions(approximation.moves)).long())
            approximation.scores = importance(attention, approximation.errors, approximation.group.head_weights)
            approximation.looking = None
            self._climb(request, approximation, Reason.RUNG)
            return False
        if approximation.probes is not None:
            approximation.residual = approximation.probes.residual()
            if not approximation.is_bounded:
                return True
            limit = approximation.group.calibration.residual_limit(approximation.rung)
            if limit is None or not approximation.residual <= limit:
                self._escalate(request, approximation)
                return False
        approximation.group.num_approximated += 1
        return True

    def _escalate(self, request: Request, approximation: Approximation) -> None:
        if approximation.rung + 1 < len(approximation.group.key.shares):
            approximation.rung += 1
            self._climb(request, approximation, Reason.ESCALATED)
        else:
            self._retreat(request, Reason.ESCALATED)

    def _climb(self, request: Request, approximation: Approximation, reason: Reason) -> None:
        """Compute the tokens of the rung, for a reason, and what stands behind the first of them once more."""
        recomputed, sequence = approximation.recomputed, request.sequence
        # Nothing behind the first moved token counts before the rung is computed: a fork must not take it along.
        sequence.num_computed = approximation.moves[0].start
        approximation.probes = Probes(self._memory.pool, self._layers, sequence.pages, recomputed)
        request.plan = self._plan_of(request, approximation, reason)
        first = int(recomputed[0])
        request.pending = [(max(start, first), end) for start, end in request.plan.stretches if end > first]

    def publish(self, request: Request, segments: Sequence[Segment]) -> None:
        """Let others move what this request has computed."""
        risk = request.approximation.risk if request.approximation else math.inf
        start = request.num_kept_tokens
        if request.published_s is None:
            request.published_s = time.monotonic()
        self.finder.publish(request.namespace, segments, request.sequence, start=start, risk=risk)

    def release(self, request: Request) -> None:
        """The request has ended: give back its sources."""
        if request.approximation is not None and request.approximation.holds_sources:
            request.approximation.holds_sources = False
            self.finder.release(request.approximation.moves)

    def drop(self, request: Request) -> None:
        """The request is not admitted after all."""
        self.release(request)
        request.approximation = None

    def pages_held(self, requests: Iterable[Request]) -> Iterator[PageIds]:
        """Page references of sources in use, for integrity checks."""
        for request in requests:
            if request.approximation is not None and request.approximation.holds_sources:
                yield from (move.source_pages for move in request.approximation.moves)

    def corrections(
        self, namespace: str, estimator: str, moves: Sequence[Move], strength: float = 1.0
    ) -> tuple[Correction, ...] | None:
        """What is known about each move's edge; None if about one of them nothing is."""
        found = [self.estimators[estimator].correction(namespace, move.edge, strength) for move in moves]
        known = tuple(each for each in found if each is not None)
        return known if len(known) == len(moves) else None

    def _find(self, request: Request) -> list[Move]:
        if not self.may_reuse(request):
            return []
        return self.finder.find(
            request.namespace,
            request.segments,
            request.sequence.num_computed,
            request.sequence,
            is_use=not request.is_trial,
        )

    def _evidence(self, namespace: str, edge: Edge) -> int:
        return sum(estimator.evidence(namespace, edge) for estimator in self.estimators.values())

    def _decide(
        self, request: Request, moves: Sequence[Move], policy: ReusePolicy
    ) -> tuple[Approximation | None, Reason]:
        if request.variant is not None:
            return self._forced(request, moves, request.variant)
        if self.corrections(request.namespace, policy.estimator, moves) is None:
            return None, Reason.NO_ANCHORS
        group = self.groups.find(request.namespace, GroupKey.of(moves, policy.estimator, policy.rungs))
        calibration = None if group is None else group.calibration
        if group is None or calibration is None or calibration.num_pairs < calibration.pairs_needed(policy.delta):
            return None, Reason.UNCALIBRATED
        group.num_requests += not request.is_trial
        if group.breaker(Bound(policy.max_divergence, policy.delta)).tripped:
            return None, Reason.BREAKER
        rung = calibration.choose(policy.max_divergence, policy.delta)
        if rung is None:
            return None, Reason.BOUND
        corrections = self.corrections(request.namespace, policy.estimator, moves, group.strength)
        assert corrections is not None
        predicted = calibration.predicted(rung, policy.confidence)
        num_exact = request.sequence.num_computed
        approximation = Approximation(tuple(moves), corrections, group, rung, predicted, num_exact)
        if max(move.risk for move in moves) > 0 and approximation.risk > policy.max_divergence:
            return None, Reason.SOURCE_RISK
        passes = _passes(moves, approximation.share, request.num_prompt_tokens)
        if not self._cost.is_worth_it(passes, num_moved(moves), num_exact, request.num_prompt_tokens):
            return None, Reason.COST
        return approximation, Reason.NO_SOURCE

    def _forced(self, request: Request, moves: Sequence[Move], variant: Variant) -> tuple[Approximation | None, Reason]:
        corrections = self.corrections(request.namespace, variant.estimator, moves, variant.strength)
        if corrections is None:
            return None, Reason.NO_ANCHORS
        approximation = forced(moves, corrections, variant, request.sequence.num_computed)
        group = approximation.group
        group.head_weights = self.groups.head_weights(request.namespace, group.key)
        return approximation, Reason.NO_SOURCE

    def _plan_of(self, request: Request, approximation: Approximation, reason: Reason = Reason.RUNG) -> Plan:
        """The plan as far as it is known by now; `reason`: why moved tokens are computed after all."""
        num_exact = approximation.num_exact
        moved = [(move.start, move.end) for move in approximation.moves]
        parts = parts_of(
            request.segments, num_exact, moved, otherwise=approximation.otherwise, unmoved=approximation.unmoved
        )
        return plan_of(num_exact, _with_rung(parts, approximation.recomputed, reason))

    def _retreat(self, request: Request, reason: Reason) -> None:
        """Compute everything behind the exact prefix."""
        self.drop(request)
        request.has_retreated = True
        sequence = request.sequence
        sequence.rewind(sequence.num_exact)
        parts = [Part(sequence.num_computed, request.num_prompt_tokens, reason)]
        request.plan = plan_of(sequence.num_computed, parts)
        request.pending = list(request.plan.stretches)


def candidates(moves: Sequence[Move]) -> Iterator[Sequence[Move]]:
    """All moves, and only those of exact sources where that is fewer."""
    if moves:
        yield moves
    certain = [move for move in moves if move.is_exact]
    if 0 < len(certain) < len(moves):
        yield certain


def _passes(moves: Sequence[Move], share: float, num_tokens: int) -> list[list[tuple[int, int]]]:
    """What is computed pass by pass, as far as that can be told before it is known which tokens a rung takes."""
    positions = moved_positions(moves)
    count = int(share * len(positions))
    passes = [computed_stretches(moves, np.empty(0, dtype=np.int32), num_tokens)]
    if count:
        spread = positions[np.linspace(0, len(positions) - 1, count).astype(np.int64)]
        passes.append(computed_stretches(moves, spread, num_tokens))
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
