"""The planner of approximate reuse: what of a prompt is moved, at which rung, and on what grounds.

It decides and hands out attempts (`attempt`); nothing of a request or of its sequence is written here. A decision
allows moving only where a level of pairs keeps the caller's bound (`align.levels`, `decision`). Who learns is the
learner's matter. Called under the engine's lock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import SourcesRead, sources_of
from kvcomm.align.edges import Edge
from kvcomm.align.estimators import Correction, Estimator
from kvcomm.align.ladder import Ladder, Rung
from kvcomm.align.levels import ReaderBook
from kvcomm.align.moves import Move, edges_of, num_moved
from kvcomm.align.readers import Reader, reader_of
from kvcomm.align.standings import Level
from kvcomm.errors import InvalidRequest
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment
from kvcomm.reuse.asked import Asked
from kvcomm.reuse.attempt import Attempt, AttemptTools, TargetPrompt, passes_of
from kvcomm.reuse.beginnings import MovedBeginnings
from kvcomm.reuse.cost import ReuseCost
from kvcomm.reuse.decision import Acceptance, decide
from kvcomm.reuse.finder import MoveFinder
from kvcomm.reuse.plan import Explanation, Plan, Reason, plan_of
from kvcomm.values import told

MAX_SOURCE_RISK = 2.0
"""Of what the caller accepts. Risks are what most prompts stay well below, and along generations they add up; what a
source is off by shows in the pairs of its readers, so this only ends chains that nobody has measured. The prior has
seen none: where it decides, risks must stay within what the caller accepts, see `_bears`."""


class Decision(NamedTuple):
    """What is to become of the moves that were found: `corrections` and `wanted` where they are used, else why not.

    Attributes:
        max_risk: nats that sources may be off by, where they are off by too much.
    """

    corrections: tuple[Correction, ...] = ()
    wanted: Acceptance | Rung | None = None
    reason: Reason | None = None
    max_risk: float = math.inf


class Planner:
    """Plans the requests of one engine."""

    def __init__(
        self,
        tools: AttemptTools,
        estimators: Mapping[str, Estimator],
        book: ReaderBook,
        cost: ReuseCost,
        *,
        immovable: str | None,
    ) -> None:
        """Make one.

        Args:
            immovable: why this model's keys cannot be moved, or None.
        """
        self.finder = MoveFinder(tools.memory)
        self.estimators = estimators
        self.book = book
        self.immovable = immovable
        self._tools = tools
        self._cost = cost
        self._beginnings = MovedBeginnings(tools.memory)

    def plan(self, asked: Asked, otherwise: Reason) -> tuple[Plan, Attempt | None]:
        """The plan of a request whose exact prefix has been found, and the attempt that is to carry it out, if any.

        Args:
            otherwise: why what is not cached exactly has to be computed.
        """
        if self.immovable:
            return self._computed(asked, otherwise, Reason.IMMOVABLE), None
        reader = reader_of(asked.segments)
        found, decision = self._choose(asked, reader)
        if decision.wanted is None:
            self.finder.release(found.moves)
            assert decision.reason is not None
            return self._computed(asked, otherwise, decision.reason, found.back_until), None
        prompt = self._prompt(asked, otherwise, found.unmoved, found.back_until)
        weights = self.book.heads(asked.namespace).weights
        attempt = Attempt(self._tools, prompt, reader, found.moves, decision.corrections, decision.wanted, weights)
        return attempt.plan, attempt

    def explain(self, asked: Asked) -> Explanation:
        """What there is to say about the plan that a request has got."""
        plan, attempt, cost = asked.plan, asked.attempt, self._cost.model
        cold_s = None if cost is None else cost.compute_s([(0, asked.num_prompt_tokens)])
        if attempt is None:
            return Explanation(plan, prefill_s=None if cost is None else cost.compute_s(plan.stretches), cold_s=cold_s)
        passes = passes_of(attempt.moves, attempt.rung.share, asked.num_prompt_tokens)
        prefill_s = None if cost is None else cost.plan_s(passes, num_moved(attempt.moves))
        return Explanation(plan, attempt.rung.share, attempt.risk, prefill_s, cold_s)

    def prepare(self) -> None:
        """Measure the machine, once; on the engine's thread, not under the lock."""
        self._cost.prepare()

    def waits_for_source(self, asked: Asked, running: Iterable[Asked]) -> bool:
        """Whether a prefill in flight is about to make a segment known that this request would be allowed to move."""
        if self.immovable or not asked.may_move:
            return False
        soon = {
            segment.token_ids
            for other in running
            if not other.is_prefilled and other.namespace == asked.namespace
            for segment in other.segments
            if segment.name is not None and segment.token_ids
        }
        is_read = any(
            segment.name is not None
            and segment.token_ids in soon
            and not self.finder.is_known(asked.namespace, segment)
            for segment in asked.segments
        )
        return is_read and (asked.rung is not None or self._has_grounds(asked))

    def publish(self, asked: Asked, segments: Sequence[Segment]) -> None:
        """Let others move what this request has computed."""
        # What stands on approximate KV that nobody foresaw (a restored context's) may be off by anything.
        attempt = asked.attempt
        risk = math.inf if attempt is None else attempt.risk
        self.finder.publish(asked.namespace, segments, asked.sequence, start=asked.num_kept_tokens, risk=risk)
        if attempt is not None and attempt.is_accepted and asked.rung is None:
            ends = [move.end for move in attempt.moves]
            self._beginnings.remember(asked.namespace, asked.sequence.token_ids, ends)

    def replace(self, asked: Asked, segments: Sequence[Segment]) -> None:
        """Let others move what is exact of this request now, in place of what was not."""
        self.finder.replace(asked.namespace, segments, asked.sequence)

    def release(self, attempt: Attempt | None) -> None:
        """An attempt has ended, or is not made after all: give back its sources."""
        if attempt is not None and attempt.holds_sources:
            attempt.holds_sources = False
            self.finder.release(attempt.moves)

    def pages_held(self, requests: Iterable[Asked]) -> Iterator[PageIds]:
        """Page references of sources in use, for integrity checks."""
        for asked in requests:
            if asked.attempt is not None and asked.attempt.holds_sources:
                yield from (move.source_pages for move in asked.attempt.moves)

    def corrections(self, namespace: str, estimator: str, edges: Sequence[Edge]) -> tuple[Correction, ...] | None:
        """What is known about each edge; None if about one of them nothing is, or about none more than turning.

        Estimators that learn correct nothing between slots of one row; where that is all there is, they are no other
        way than turning.
        """
        chosen = self.estimators[estimator]
        found = [chosen.correction(namespace, edge) for edge in edges]
        known = tuple(each for each in found if each is not None)
        return known if len(known) == len(edges) and any(map(chosen.corrects, edges)) else None

    def known(self, namespace: str, rungs: Iterable[Rung], edges: Sequence[Edge]) -> dict[str, tuple[Correction, ...]]:
        """`corrections` by estimator of the rungs, of those that have any."""
        names = dict.fromkeys(rung.estimator for rung in rungs)
        found = {name: self.corrections(namespace, name, edges) for name in names}
        return {name: each for name, each in found.items() if each is not None}

    def require_known(self, rungs: Iterable[Rung]) -> None:
        """Raises InvalidRequest for a rung whose estimator or chooser this engine does not have."""
        for rung in rungs:
            if not isinstance(rung, Rung):
                raise InvalidRequest(f'a rung must be a Rung, such as Rung("token", 0.3), not {told(rung)}')
            for what, name, known in (
                ("estimator", rung.estimator, self.estimators),
                ("chooser", rung.chooser, self._tools.choosers),
            ):
                if name not in known:
                    raise InvalidRequest(f"unknown {what} {name!r} of a rung; this engine has {', '.join(known)}")

    def _prompt(self, asked: Asked, otherwise: Reason, unmoved: Reason, back_until: int) -> TargetPrompt:
        return TargetPrompt(
            asked.segments,
            asked.num_prompt_tokens,
            asked.sequence.num_computed,
            otherwise,
            unmoved,
            asked.may_move and self.finder.is_displaced(asked.namespace, asked.segments),
            back_until,
        )

    def _computed(self, asked: Asked, otherwise: Reason, unmoved: Reason, back_until: int = 0) -> Plan:
        """The plan of a request into whose prompt nothing is moved."""
        prompt = self._prompt(asked, otherwise, unmoved, back_until)
        return plan_of(prompt.num_exact, prompt.parts([]))

    def _find(self, asked: Asked, max_risk: float) -> tuple[list[Move], Reason]:
        """What may be moved, and why other slots are not; holds the pages of the sources.

        No source of more risk. Where one is left out, others are chosen anew: which of them fit depends on their
        neighbors.
        """
        if not asked.may_move:
            return [], Reason.NO_SOURCE
        moves = self._sources(asked, math.inf)
        if all(move.risk <= max_risk for move in moves):
            return moves, Reason.NO_SOURCE
        self.finder.release(moves)
        return self._sources(asked, max_risk), Reason.SOURCE_RISK

    def _sources(self, asked: Asked, max_risk: float) -> list[Move]:
        sequence, is_use = asked.sequence, not asked.is_trial
        return self.finder.find(
            asked.namespace, asked.segments, sequence.num_computed, sequence, max_risk=max_risk, is_use=is_use
        )

    def _choose(self, asked: Asked, reader: Reader) -> tuple[_Found, Decision]:
        """Moves whose pages are held, and what is to become of them."""
        max_risk = math.inf if asked.rung is not None else MAX_SOURCE_RISK * asked.policy.max_divergence
        moves, unmoved = self._find(asked, max_risk)
        back_until = self._back_until(asked, moves)
        moves = self._behind(moves, back_until)
        if not moves:
            return _Found(moves, unmoved, back_until), Decision(reason=Reason.COMES_BACK if back_until else unmoved)
        if asked.rung is None and not asked.is_trial:
            self.book.standing(asked.namespace, reader).num_requests += 1
        decision = self._decide_or_release(asked, reader, moves)
        if decision.reason is Reason.SOURCE_RISK:
            self.finder.release(moves)
            moves, unmoved = self._find(asked, decision.max_risk)
            moves = self._behind(moves, back_until)
            # Other sources may have read other text, and are then judged by other pairs.
            decision = self._decide_or_release(asked, reader, moves) if moves else Decision(reason=unmoved)
        return _Found(moves, unmoved, back_until), decision

    def _back_until(self, asked: Asked, moves: Sequence[Move]) -> int:
        """How far text is computed because it was moved to the same place before."""
        sequence = asked.sequence
        if asked.rung is not None or sequence.num_exact < sequence.num_computed:  # it cannot become an exact prefix
            return 0
        ends = [move.end for move in moves]
        forget = not asked.is_trial
        return self._beginnings.back_until(asked.namespace, sequence.token_ids, ends, forget=forget)

    def _behind(self, moves: Sequence[Move], position: int) -> list[Move]:
        """Those that end behind a position; the others are released."""
        self.finder.release([move for move in moves if move.end <= position])
        return [move for move in moves if move.end > position]

    def _decide_or_release(self, asked: Asked, reader: Reader, moves: Sequence[Move]) -> Decision:
        try:
            return self._decide(asked, reader, moves)
        except BaseException:
            self.finder.release(moves)
            raise

    def _decide(self, asked: Asked, reader: Reader, moves: Sequence[Move]) -> Decision:
        if asked.rung is not None:
            corrections = self.corrections(asked.namespace, asked.rung.estimator, edges_of(moves))
            return Decision(reason=Reason.NO_ANCHORS) if corrections is None else Decision(corrections, asked.rung)
        usable = self._usable(asked, moves)
        read = sources_of(moves).read
        accepted = decide(self.book, asked.namespace, reader, usable, asked.policy, read=read)
        if isinstance(accepted, Reason):
            return Decision(reason=accepted)
        if not _bears(accepted, moves, asked.policy.max_divergence):
            return Decision(reason=Reason.SOURCE_RISK, max_risk=asked.policy.max_divergence - accepted.predicted)
        passes = passes_of(moves, accepted.rung.share, asked.num_prompt_tokens)
        num_exact = asked.sequence.num_computed
        if not self._cost.is_worth_it(passes, num_moved(moves), num_exact, asked.num_prompt_tokens):
            return Decision(reason=Reason.COST)
        return Decision(usable[accepted.ladder], accepted)

    def _usable(self, asked: Asked, moves: Sequence[Move]) -> dict[Ladder, tuple[Correction, ...]]:
        """The caller's ladders whose estimator knows enough about every move, and what it knows."""
        known = self.known(asked.namespace, asked.policy.rungs, edges_of(moves))
        return {ladder: known[ladder[0].estimator] for ladder in asked.policy.ladders if ladder[0].estimator in known}

    def _has_grounds(self, asked: Asked) -> bool:
        """Whether any pairs would decide about it, whatever its sources have read."""
        policy = asked.policy
        bound, reader = Bound(policy.max_divergence, policy.delta), reader_of(asked.segments)
        return any(
            self.book.grounds(asked.namespace, reader, policy.ladders, bound, policy.levels, read=read)
            for read in SourcesRead
        )


class _Found(NamedTuple):
    """Moves whose pages are held, why other slots are not moved, and where text ends that comes back."""

    moves: list[Move]
    unmoved: Reason
    back_until: int


def _bears(accepted: Acceptance, moves: Sequence[Move], epsilon: float) -> bool:
    """Whether what sources are off by, and what the rung adds, stay within the bound where a prior decides.

    Its pairs had exact sources. Goes to safer rungs as long as that helps; at the safest one if nothing does.
    """
    risk = max(move.risk for move in moves)
    while accepted.level is Level.PRIOR and accepted.predicted + risk > epsilon:
        if not accepted.escalate():
            return False
    return True
