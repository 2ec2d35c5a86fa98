"""Learning, calibrating, auditing and repairing: the jobs that idle time is spent on.

After an exact request whose text was also known in another context, the pair teaches: first the anchors of its edges,
then whether they beat moving alone, then, prompt by prompt, what each rung would have cost. After an approximate
request a sampled share is computed exactly and compared. Changes groups and anchors under the engine's lock; passes run
outside.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Pair
from kvcomm.align.groups import Audit, EdgeGroup, GroupKey
from kvcomm.align.ladder import top_tokens
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.spans import place_of
from kvcomm.engine.request import NUM_CONTINUATION, Request
from kvcomm.errors import EngineClosed, InvalidRequest
from kvcomm.lab.selectors import SELECTORS, SelectorView
from kvcomm.lab.variant import Variant
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.reuse.attempt import Approximation
from kvcomm.reuse.idle_work import IdleWork, Job, Steps
from kvcomm.reuse.planner import Reuse, candidates
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Case, Outcome, Replay, Replayer

logger = logging.getLogger("kvcomm.audit")

NOTHING: IntArray = np.empty(0, dtype=np.int32)
"""No positions."""

_EXACT = ReusePolicy.exact()


class Repairable(Protocol):
    """A context, as far as repairing it goes."""

    @property
    def sequence(self) -> KVSequence:
        """Its tokens and pages."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request is writing it."""
        ...

    @property
    def released(self) -> bool:
        """Whether it is gone."""
        ...

    def repaired(self) -> None:
        """Its KV is exact now."""
        ...


class Learner:
    """Makes the jobs of one engine."""

    def __init__(
        self,
        memory: Memory,
        layers: Sequence[LayerStore],
        reuse: Reuse,
        replayer: Replayer,
        idle: IdleWork,
        *,
        chunk: int,
        end_token_ids: frozenset[int],
    ) -> None:
        """Args:
        chunk: tokens of a prefill pass in idle time.
        """
        self._memory = memory
        self._layers = layers
        self._reuse = reuse
        self._replayer = replayer
        self._idle = idle
        self._lock = replayer.lock
        self._chunk = chunk
        self._ends = end_token_ids
        self._random = random.Random(0)
        self.num_audits = 0
        self.num_violations = 0

    def after(self, request: Request) -> None:
        """A request has succeeded and still holds its pages: queue what can be learned from it. Under the lock."""
        policy = request.policy
        if policy.is_exact or request.variant or request.sampling.n > 1 or self._reuse.immovable:
            return
        if request.approximation is not None:
            if self._random.random() < policy.audit:
                self._add(request, policy, self._audit)
        elif policy.learn and request.sequence.approximate_from is None and not request.has_retreated:
            self._add(request, policy, self._study)

    def learn(
        self, namespace: str, weights: Weights, segments: tuple[Segment, ...], estimators: Sequence[str]
    ) -> Future[int]:
        """Teach estimators the edges of a prompt that is computed or can be, whatever has been learned already.

        The future gives how many tokens were kept.
        """
        future: Future[int] = Future()

        def steps(trial: _Trial) -> Steps:
            yield from self._complete(trial)
            kept = sum(self._teach(trial, name, trial.moves) for name in estimators)
            future.set_result(kept)

        self._add_trial(namespace, weights, segments, steps, future)
        return future

    def calibrate(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        answer: Sequence[int],
        policy: ReusePolicy,
    ) -> Future[EdgeGroup | None]:
        """Add a prompt, followed by its exact greedy answer, to the contest or the calibration of its group.

        The future gives the group; None when nothing of the prompt can be moved, or too little is known about it.
        """
        future: Future[EdgeGroup | None] = Future()

        def steps(trial: _Trial) -> Steps:
            yield from self._complete(trial)
            case = self._case(trial, tuple(answer[:NUM_CONTINUATION]))
            group = None
            if case.moves and self._reuse.corrections(namespace, policy.estimator, case.moves) is not None:
                group = self._group(trial, case.moves)
                yield from self._examine(trial, case, self._replayer.exact(case), case.moves, group)
            future.set_result(group)

        self._add_trial(namespace, weights, segments, steps, future, policy)
        return future

    def measure(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        answer: Sequence[int],
        variants: Sequence[Variant],
    ) -> Future[list[Outcome]]:
        """Replay a prompt, followed by its exact greedy answer, in every way asked for.

        The future gives one outcome per variant; none at all when nothing of the prompt can be moved.
        """
        future: Future[list[Outcome]] = Future()

        def steps(trial: _Trial) -> Steps:
            yield from self._complete(trial)
            case = self._case(trial, tuple(answer[:NUM_CONTINUATION]))
            outcomes: list[Outcome] = []
            if case.moves:
                exact = self._replayer.exact(case)
                yield
                unchanged: dict[tuple[str, float], Replay] = {}
                for variant in variants:
                    outcomes.append(self._variant(trial, case, exact, variant, unchanged))
                    yield
            future.set_result(outcomes)

        self._add_trial(namespace, weights, segments, steps, future)
        return future

    def repair(self, namespace: str, weights: Weights, context: Repairable) -> Future[bool]:
        """Compute the exact twin of a context's KV and put it in place of an approximate one.

        The future gives whether the context is exact then.
        """
        future: Future[bool] = Future()

        def steps(trial: _Trial) -> Steps:
            while True:
                with self._lock:
                    own = context.sequence
                    if own.approximate_from is None or not self._grow(trial, own.token_ids[: own.num_computed]):
                        break
                yield from self._replayer.prefill(trial.sequence.token_ids, trial.sequence, self._chunk)
                with self._lock:
                    if not context.busy and self._put_in_place(trial, context):
                        break
                yield
            future.set_result(not context.released and context.sequence.approximate_from is None)

        self._add_trial(namespace, weights, (), steps, future)
        return future

    def _grow(self, trial: _Trial, wanted: IntArray) -> bool:
        """Let a twin have at least these tokens; False if that makes no sense any more. Under the lock."""
        twin = trial.sequence
        if not len(wanted) or not np.array_equal(wanted[: twin.num_tokens], twin.token_ids):
            return False
        twin.append(wanted[twin.num_tokens :])
        if not twin.num_computed:
            match = self._memory.tree.match(trial.namespace, twin.token_ids)
            twin.adopt(match.pages, match.num_tokens)
        self._memory.make_writable(twin, twin.num_computed, twin.num_tokens)
        return True

    def _put_in_place(self, trial: _Trial, context: Repairable) -> bool:
        """Exchange the KV of a context for its twin's if they still have the same tokens. Under the lock."""
        own, twin = context.sequence, trial.sequence
        if own.num_computed != twin.num_computed:
            return False
        own.exchange(twin)
        context.repaired()
        whole = own.num_computed - own.num_computed % self._memory.pool.page_size
        pages = own.pages[: whole // self._memory.pool.page_size]
        self._memory.tree.insert(trial.namespace, own.token_ids[:whole], pages)
        return True

    def _add(self, request: Request, policy: ReusePolicy, make: Callable[[_Trial], Steps]) -> None:
        """Queue a job on a finished request, which still holds its pages."""
        if not any(segment.name is not None for segment in request.segments):
            return
        trial = _Trial(
            request.namespace,
            request.weights,
            request.segments,
            request.sequence.fork(),
            request.num_prompt_tokens,
            policy,
        )
        trial.answer = tuple(request.branches[0].token_ids)
        trial.is_greedy = request.is_greedy_answer
        trial.served = request.approximation
        # What later readers left is no source for this one: text flows from its first reader to the others.
        before_s = math.inf if request.published_s is None else request.published_s
        try:
            trial.moves = self._find(trial, request.plan.num_exact_prefix, before_s)
        except BaseException:
            trial.sequence.release()
            raise
        if trial.moves or trial.served is not None:  # an audit needs no sources; leaving some out would bias it
            self._queue(trial, make(trial), is_urgent=trial.served is not None)
        else:
            trial.sequence.release()

    def _add_trial(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        make: Callable[[_Trial], Steps],
        future: Future[list[Outcome]] | Future[int] | Future[EdgeGroup | None] | Future[bool],
        policy: ReusePolicy = _EXACT,
    ) -> None:
        """Queue a job on a prompt that somebody waits for; its failure is theirs to see."""

        def guarded(trial: _Trial) -> Steps:
            try:
                yield from make(trial)
            except Exception as error:
                future.set_exception(error)
                raise

        def settle() -> None:
            if not future.done():
                future.set_exception(EngineClosed("the engine was closed before it came to this"))

        with self._lock:
            token_ids = [token for segment in segments for token in segment.token_ids]
            sequence = KVSequence(self._memory.pool, token_ids)
            trial = _Trial(namespace, weights, segments, sequence, len(token_ids), policy)
            self._queue(trial, guarded(trial), is_urgent=True, on_end=settle)

    def _queue(
        self, trial: _Trial, steps: Steps, *, is_urgent: bool, on_end: Callable[[], None] = lambda: None
    ) -> None:
        def release() -> None:
            for sequence in trial.sequences:
                sequence.release()
            self._reuse.finder.release(trial.moves)
            trial.moves = []
            on_end()

        def pages() -> list[PageIds]:
            return [*(sequence.pages for sequence in trial.sequences), *(move.source_pages for move in trial.moves)]

        self._idle.add(Job(self._replayer.serving(trial.weights, steps), release, pages, is_urgent))

    def _find(self, trial: _Trial, num_exact: int, before_s: float = math.inf) -> list[Move]:
        return self._reuse.finder.find(trial.namespace, trial.segments, num_exact, trial.sequence, before_s=before_s)

    def _complete(self, trial: _Trial) -> Steps:
        """Take the prompt from the tree, compute exactly what is missing, and find its moves as if none of it were."""
        sequence, num_prompt = trial.sequence, trial.num_prompt
        with self._lock:
            match = self._memory.tree.match(trial.namespace, sequence.token_ids)
            sequence.adopt(match.pages, match.num_tokens)
            self._memory.make_writable(sequence, sequence.num_computed, num_prompt)
        yield from self._replayer.prefill(sequence.token_ids, sequence, self._chunk)
        with self._lock:
            trial.moves = self._find(trial, 0)

    def _case(self, trial: _Trial, continuation: tuple[int, ...]) -> Case:
        return Case(trial.sequence, trial.num_prompt, continuation, tuple(trial.moves))

    def _study(self, trial: _Trial) -> Steps:
        """Teach, compare or calibrate, whatever these moves need next."""
        for moves in candidates(trial.moves):
            yield from self._study_moves(trial, moves)

    def _study_moves(self, trial: _Trial, moves: Sequence[Move]) -> Steps:
        policy, namespace = trial.policy, trial.namespace
        estimator = self._reuse.estimators[policy.estimator]
        with self._lock:
            young = [
                move
                for move in moves
                if not estimator.is_ready(namespace, move.edge) and not self._reuse.groups.rest_on(namespace, move.edge)
            ]
        if young:
            self._teach(trial, policy.estimator, young)
            return
        group = self._group(trial, moves)
        found = yield from self._exact_case(trial)
        if found is not None:
            yield from self._examine(trial, *found, moves, group)

    def _group(self, trial: _Trial, moves: Sequence[Move]) -> EdgeGroup:
        policy = trial.policy
        with self._lock:
            key = GroupKey.of(moves, policy.estimator, policy.rungs)
            return self._reuse.groups.group(trial.namespace, key, self._reuse.estimators[policy.estimator].strengths)

    def _examine(self, trial: _Trial, case: Case, exact: Tensor, moves: Sequence[Move], group: EdgeGroup) -> Steps:
        """Let a prompt take part in what its group is at: the contest, then the calibration."""
        if group.contest.is_over:
            if not group.calibration.num_pairs:  # fixed now: what a rung takes is part of what is calibrated
                with self._lock:
                    group.head_weights = self._reuse.groups.importance_fit(trial.namespace).weights()
            yield from self._calibrate(trial, case, exact, moves, group)
        else:
            yield from self._compare(trial, case, exact, moves, group)

    def _teach(self, trial: _Trial, name: str, moves: Sequence[Move]) -> int:
        """Let an estimator learn from moves whose source is exact; the sequence holds the truth.

        Groups that rest on these anchors begin anew.
        """
        total = 0
        for move in moves:
            if not move.is_exact:
                continue
            truth = place_of(self._memory.pool, trial.sequence.pages, move.start, move.num_tokens, position=move.start)
            estimator = self._reuse.estimators[name]
            kept = estimator.learn(trial.namespace, self._layers, move, truth)
            total += kept
            with self._lock:
                for group in self._reuse.groups.rest_on(trial.namespace, move.edge) if kept else ():
                    if group.key.estimator == name:
                        group.restart()
        return total

    def _compare(self, trial: _Trial, case: Case, exact: Tensor, moves: Sequence[Move], group: EdgeGroup) -> Steps:
        attended = self._replayer.attended(case, moves)
        yield
        replays = []
        for strength in group.strengths:
            replays.append(self._replay(trial, case, exact, moves, group.key.estimator, strength))
            yield
        divergences = [replay.outcome.divergence for replay in replays]
        if all(math.isfinite(divergence) for divergence in divergences):
            with self._lock:
                group.contest.add(divergences)
                self._reuse.groups.importance_fit(trial.namespace).add(replays[0].attention, attended)

    def _calibrate(self, trial: _Trial, case: Case, exact: Tensor, moves: Sequence[Move], group: EdgeGroup) -> Steps:
        def replay(recomputed: IntArray) -> Replay:
            return self._replay(trial, case, exact, moves, group.key.estimator, group.strength, recomputed)

        unchanged = replay(NOTHING)
        scores = unchanged.scores(group.head_weights)
        yield
        outcomes = []
        for share in group.key.shares:
            recomputed = top_tokens(moves, share, scores)
            outcomes.append(replay(recomputed).outcome if len(recomputed) else unchanged.outcome)
            yield
        divergences = tuple(outcome.divergence for outcome in outcomes)
        if all(math.isfinite(divergence) for divergence in divergences):
            with self._lock:
                residuals = tuple(outcome.residual for outcome in outcomes)
                group.calibration.add(Pair(divergences, unchanged.outcome.distance, residuals))

    def _replay(
        self,
        trial: _Trial,
        case: Case,
        exact: Tensor,
        moves: Sequence[Move],
        estimator: str,
        strength: float,
        recomputed: IntArray = NOTHING,
    ) -> Replay:
        corrections = self._reuse.corrections(trial.namespace, estimator, moves, strength)
        if corrections is None:
            raise InvalidRequest(f"estimator {estimator!r} knows nothing about some segment of this prompt")
        return self._replayer.moved(case, exact, corrections, moves, recomputed)

    def _variant(
        self,
        trial: _Trial,
        case: Case,
        exact: Tensor,
        variant: Variant,
        unchanged: dict[tuple[str, float], Replay],
    ) -> Outcome:
        """One way to reuse a prompt; see `_recomputed`."""
        recomputed = self._recomputed(trial, case, exact, variant, unchanged)
        estimator = variant.estimator, variant.strength
        if not len(recomputed):
            return unchanged[estimator].outcome
        return self._replay(trial, case, exact, case.moves, *estimator, recomputed).outcome

    def _recomputed(
        self,
        trial: _Trial,
        case: Case,
        exact: Tensor,
        variant: Variant,
        unchanged: dict[tuple[str, float], Replay],
    ) -> IntArray:
        """Positions that a variant recomputes; `unchanged` keeps what estimators give when nothing is recomputed."""
        estimator = variant.estimator, variant.strength
        if estimator not in unchanged:
            unchanged[estimator] = self._replay(trial, case, exact, case.moves, *estimator)
        with self._lock:
            key = GroupKey.of(case.moves, variant.estimator, ())
            head_weights = self._reuse.groups.head_weights(trial.namespace, key)
        view = SelectorView(case, self._replayer, unchanged[estimator].scores(head_weights))
        return SELECTORS[variant.selector](view, variant.share)

    def _audit(self, trial: _Trial) -> Steps:
        """Compute an approximate request exactly and hold what was served against it."""
        assert trial.served is not None
        served, group = trial.sequence, trial.served.group
        with self._lock:
            twin = KVSequence(self._memory.pool, served.token_ids[: trial.num_prompt])
            trial.others.append(served)
            trial.sequence = twin
            match = self._memory.tree.match(trial.namespace, twin.token_ids[:-1])
            twin.adopt(match.pages, match.num_tokens)
            self._memory.make_writable(twin, twin.num_computed, trial.num_prompt)
        yield from self._replayer.prefill(twin.token_ids, twin, self._chunk)
        trial.is_greedy = False  # the answer at hand is that of the approximate context
        found = yield from self._exact_case(trial)
        if found is None:
            return
        case, exact = found
        divergence = self._replayer.served(Case(served, trial.num_prompt, case.continuation, ()), exact)
        self._record_audit(trial, divergence)
        yield
        if trial.moves and GroupKey.of(trial.moves, group.key.estimator, group.key.shares) == group.key:
            yield from self._calibrate(trial, case, exact, trial.moves, group)

    def _record_audit(self, trial: _Trial, divergence: float) -> None:
        assert trial.served is not None
        policy, group = trial.policy, trial.served.group
        bound = Bound(policy.max_divergence, policy.delta)
        audit = Audit(time.monotonic(), divergence, trial.served.risk, bound)
        with self._lock:
            self.num_audits += 1
            self.num_violations += audit.is_violation
            group.audits.append(audit)
            group.num_audited += 1
            tripped_now = group.breaker(bound).observe(audit.is_violation)
        if tripped_now:
            logger.warning(
                "the bound of %g nats at confidence %g does not hold for edge group %s: computed exactly from now on",
                policy.max_divergence,
                policy.confidence,
                group.key.digest[:12],
            )

    def _exact_case(self, trial: _Trial) -> Generator[None, None, tuple[Case, Tensor] | None]:
        """The case of an exact sequence and its log-probabilities; None if the exact answer has no token."""
        continuation = yield from self._continuation(trial)
        if not continuation:
            return None
        case = self._case(trial, continuation)
        exact = self._replayer.exact(case)
        yield
        return case, exact

    def _continuation(self, trial: _Trial) -> Generator[None, None, tuple[int, ...]]:
        """The exact greedy answer's first tokens: the one at hand if it is that, else decoded now."""
        if trial.is_greedy:
            return trial.answer[:NUM_CONTINUATION]
        sequence = KVSequence(self._memory.pool, trial.sequence.token_ids[: trial.num_prompt])
        found: list[int] = []
        with self._replayer.borrowed(sequence, trial.sequence, trial.num_prompt - 1, NUM_CONTINUATION):
            for token_id in self._replayer.greedy(sequence, NUM_CONTINUATION, self._ends):
                found.append(token_id)
                yield
        return tuple(found)


@dataclass(eq=False)
class _Trial:
    """What a job works on.

    Attributes:
        weights: for which its passes are; once they are gone, the job fails.
        sequence: prompt and answer, whose pages the job holds.
        is_greedy: whether `answer` is what greedy decoding gives, as far as it is looked at.
        served: how the request was approximated, for audits.
    """

    namespace: str
    weights: Weights
    segments: tuple[Segment, ...]
    sequence: KVSequence
    num_prompt: int
    policy: ReusePolicy
    answer: tuple[int, ...] = ()
    is_greedy: bool = False
    moves: list[Move] = field(default_factory=list)
    served: Approximation | None = None
    others: list[KVSequence] = field(default_factory=list)

    @property
    def sequences(self) -> list[KVSequence]:
        """Every sequence whose pages the job holds."""
        return [self.sequence, *self.others]
