"""Learning: exact prompts give pairs for every rung at once, and anchors.

No stage waits for another one: from the first prompt on that holds text known from another context, what each rung
would have cost is measured with what is known at that moment, and then the anchors of its edges are taught. Banks grow,
and with them the pairs get better; older pairs are the more careful ones. Passes run outside the engine's lock, what
is known changes under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair, sources_of
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import ReaderBook, kinds_at
from kvcomm.align.moves import Move, edges_of
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.spans import place_of
from kvcomm.align.standings import Level
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.model.live import Weights
from kvcomm.reuse.asked import Asked
from kvcomm.reuse.audit import Auditor
from kvcomm.reuse.idle_work import Steps, Urgency
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.planner import Planner
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION, Case, Exact, Measurement, Outcome
from kvcomm.reuse.trials import Approximation, Trial, Trials

ENOUGH_PAIRS = 60
"""Pairs at a ladder beyond which a reader that has a better one measures it no more."""

_EXACT = ReusePolicy.exact()


class Learner:
    """Learns from the requests of one engine, and from prompts that it is given."""

    def __init__(self, trials: Trials, planner: Planner, layers: Sequence[LayerStore]) -> None:
        self.auditor = Auditor(trials, planner.book, self._queue_study)
        self._trials = trials
        self._planner = planner
        self._book: ReaderBook = planner.book
        self._layers = layers
        self._lock = trials.lock

    def after(self, asked: Asked) -> None:
        """A request has succeeded and still holds its pages: queue what can be learned from it. Under the lock."""
        if asked.lesson is not None:
            self._queue_lesson(asked, asked.lesson)
            return
        policy, attempt = asked.policy, asked.attempt
        if policy.is_exact or asked.rung is not None or asked.num_choices > 1 or self._planner.immovable:
            return
        if not any(segment.name is not None for segment in asked.segments):
            return
        if attempt is not None and attempt.is_accepted and attempt.acceptance is not None:
            self._book.standing(asked.namespace, attempt.reader).num_approximated += 1
            if self.auditor.is_due(asked.namespace, attempt.reader, policy):
                # An audit needs no sources; leaving some out would bias it.
                self._queue(asked, Approximation(attempt.acceptance.level, attempt.risk))
        elif policy.learn and asked.sequence.approximate_from is None:
            self._queue(asked, None)

    def learn(
        self, namespace: str, weights: Weights, segments: tuple[Segment, ...], estimators: Sequence[str]
    ) -> Future[int]:
        """Teach estimators the edges of a prompt that is computed or can be, whatever has been learned already.

        The future gives how many tokens were kept.
        """

        def steps(trial: Trial) -> Generator[None, None, int]:
            yield from self._trials.complete(trial)
            return sum(self._teach(trial, name, trial.moves) for name in estimators)

        return self._trials.promise(namespace, weights, segments, steps, _EXACT)

    def calibrate(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        answer: Sequence[int],
        policy: ReusePolicy,
    ) -> Future[Pair | None]:
        """Add a prompt, followed by its exact greedy answer, to the pairs of its reader; anchors stay as they are.

        The future gives the pair; None when nothing of the prompt can be moved.
        """

        def steps(trial: Trial) -> Generator[None, None, Pair | None]:
            yield from self._trials.complete(trial)
            case = self._trials.case(trial, answer, trial.moves)
            if not case.moves:
                return None
            exact = self._trials.replayer.exact(case)
            yield
            return (yield from self._pair(trial, case, exact, policy.rungs))

        return self._trials.promise(namespace, weights, segments, steps, policy)

    def measure(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        answer: Sequence[int],
        rungs: Sequence[Rung],
    ) -> Future[list[Outcome]]:
        """Replay a prompt, followed by its exact greedy answer, at every rung asked for.

        The future gives one outcome per rung; none at all when nothing of the prompt can be moved.
        """

        def steps(trial: Trial) -> Generator[None, None, list[Outcome]]:
            yield from self._trials.complete(trial)
            case = self._trials.case(trial, answer, trial.moves)
            if not case.moves:
                return []
            exact = self._trials.replayer.exact(case)
            yield
            measured = yield from self._measure(trial, case, exact, rungs)
            missing = [rung for rung in rungs if rung not in measured.outcomes]
            if missing:
                raise InvalidRequest(
                    f"estimator {missing[0].estimator!r} knows nothing about some segment of this prompt"
                )
            return [measured.outcomes[rung] for rung in rungs]

        return self._trials.promise(namespace, weights, segments, steps, _EXACT)

    def _queue(self, asked: Asked, served: Approximation | None) -> None:
        """Queue an audit of what was served, or else a study if there is anything that could have been moved."""
        trial = self._trial(asked, asked.policy, served)
        if served is not None:
            self.auditor.queue(trial)
        elif trial.moves:
            self._queue_study(trial)
        else:
            trial.sequence.release()

    def _queue_lesson(self, asked: Asked, lesson: Lesson) -> None:
        """Queue what a request is to teach before all other studies; its lesson is settled however that ends."""
        try:
            is_movable = any(segment.name is not None for segment in asked.segments)
            if self._planner.immovable or not is_movable or asked.sequence.approximate_from is not None:
                lesson.settle(None)
                return
            trial = self._trial(asked, lesson.policy, None)
            if not trial.moves:
                trial.sequence.release()
                lesson.settle(None)
                return
            steps = self._study(trial, trial.policy.rungs, on_pair=lesson.settle)
            self._trials.queue(trial, steps, Urgency.STUDY, pays_after=-1, on_end=lambda: lesson.settle(None))
        except BaseException:
            lesson.settle(None)
            raise

    def _trial(self, asked: Asked, policy: ReusePolicy, served: Approximation | None) -> Trial:
        """A request's prompt and answer with its KV, and what could be moved into it."""
        trial = Trial(
            asked.namespace,
            asked.weights,
            asked.segments,
            asked.sequence.fork(),
            asked.num_prompt_tokens,
            policy,
            guess=asked.answer_ids,
            served=served,
        )
        # What later readers left is no source for this one: text flows from its first reader to the others.
        before_s = math.inf if asked.published_s is None else asked.published_s
        try:
            trial.moves = self._trials.find(trial, asked.plan.num_exact_prefix, before_s)
        except BaseException:
            trial.sequence.release()
            raise
        return trial

    def _queue_study(self, trial: Trial) -> None:
        bound = Bound(trial.policy.max_divergence, trial.policy.delta)
        counts = self._book.counts(
            trial.namespace,
            trial.reader,
            trial.policy.ladders,
            bound,
            trial.policy.levels,
            read=sources_of(trial.moves).read,
        )
        missing = min(
            (each.num_needed - each.num_pairs for each in counts if each.num_pairs < each.num_needed), default=0
        )
        pays_after = missing * _num_rows(trial, trial.policy.rungs) if missing else math.inf
        self._trials.queue(trial, self._study(trial), Urgency.STUDY, pays_after=pays_after)

    def _study(
        self,
        trial: Trial,
        wanted: Sequence[Rung] | None = None,
        on_pair: Callable[[Pair | None], None] = lambda pair: None,
    ) -> Steps:
        """Measure what is wanted of a prompt, let it bear on the working delta, and teach its edges.

        Args:
            wanted: rungs to measure; None: those that tell something new.
            on_pair: told what came of it, at the end.
        """
        found = yield from self._trials.exact_case(trial)
        if found is None:
            return
        case, exact = found
        pair = yield from self._pair(trial, case, exact, self._wanted(trial) if wanted is None else wanted)
        yield
        estimators = dict.fromkeys(rung.estimator for rung in trial.policy.rungs)
        for name in estimators:
            young = [
                move for move in trial.moves if not self._planner.estimators[name].is_ready(trial.namespace, move.edge)
            ]
            self._teach(trial, name, young)
        on_pair(pair)

    def _wanted(self, trial: Trial) -> tuple[Rung, ...]:
        """Rungs to measure: all, but for ladders of which enough is known for whoever cannot do better.

        While nothing can be moved, whatever pairs show, those of the ladder that is nearest to it: that pays soonest.
        """
        ladders, read = trial.policy.ladders, sources_of(trial.moves).read
        bound = Bound(trial.policy.max_divergence, trial.policy.delta)
        with self._lock:
            kinds = kinds_at(Level.POOL, read)
            alike = [pair for pair in self._book.pool(trial.namespace) if kinds is None or pair.sources.read in kinds]
            grounds = self._book.grounds(trial.namespace, trial.reader, ladders, bound, trial.policy.levels, read=read)
        counts = {ladder: sum(all(rung in pair.measured for rung in ladder) for pair in alike) for ladder in ladders}
        if grounds is None or not grounds.watch.lets_any(grounds.calibration.num_pairs):
            return max(reversed(ladders), key=lambda ladder: counts[ladder])
        wanted = [ladder for ladder in ladders if ladder == ladders[0] or counts[ladder] < ENOUGH_PAIRS]
        return tuple(rung for ladder in wanted for rung in ladder)

    def _pair(
        self, trial: Trial, case: Case, exact: Exact, rungs: Sequence[Rung]
    ) -> Generator[None, None, Pair | None]:
        """Measure a prompt and add it to what is known; None where a divergence is no number."""
        measured = yield from self._measure(trial, case, exact, rungs)
        if not measured.outcomes or not all(math.isfinite(each.divergence) for each in measured.outcomes.values()):
            return None
        pair = _pair_of(measured, case.moves)
        with self._lock:
            if exact.attended is not None and measured.looks:
                look = next(iter(measured.looks.values()))
                self._book.heads(trial.namespace).add(look.attention, exact.attended)
            self._foresee(trial, pair)
            self._book.add(trial.namespace, trial.reader, pair)
        return pair

    def _measure(
        self, trial: Trial, case: Case, exact: Exact, rungs: Sequence[Rung]
    ) -> Generator[None, None, Measurement]:
        with self._lock:
            known = self._planner.known(trial.namespace, rungs, edges_of(case.moves))
            weights = self._book.heads(trial.namespace).weights
        return (yield from self._trials.replayer.measure(case, exact, rungs, known, weights))

    def _foresee(self, trial: Trial, pair: Pair) -> None:
        """Let the rung that the prompt would have been served at bear on the working delta of each level.

        So a delta that has fallen until nothing is accepted rises again, also of a level that does not decide now. The
        level that a prompt was served by has heard of it by its audit, and hears nothing twice.
        """
        policy = trial.policy
        if policy.is_exact:
            return
        bound = Bound(policy.max_divergence, policy.delta)
        ladders = [ladder for ladder in policy.ladders if all(rung in pair.measured for rung in ladder)]
        read = pair.sources.read
        self._book.standing(trial.namespace, trial.reader)  # from now on it has a watch of its own
        unheard = [level for level in policy.levels if trial.served is None or level is not trial.served.level]
        for level in unheard:
            grounds = self._book.grounds(trial.namespace, trial.reader, ladders, bound, (level,), read=read)
            if grounds is not None and grounds.tried is not None:
                grounds.watch.would_give(pair.measured[grounds.calibration.ladder[grounds.tried]].divergence)

    def _teach(self, trial: Trial, name: str, moves: Sequence[Move]) -> int:
        """Let an estimator learn from moves whose source is exact; the sequence holds the truth."""
        total = 0
        for move in moves:
            if move.is_exact:
                pool, pages = self._trials.memory.pool, trial.sequence.pages
                truth = place_of(pool, pages, move.start, move.num_tokens, position=move.start)
                total += self._planner.estimators[name].learn(trial.namespace, self._layers, move, truth)
        return total


def _num_rows(trial: Trial, rungs: Sequence[Rung]) -> float:
    """Rows of the passes that measuring takes, about."""
    num_moved = sum(move.num_tokens for move in trial.moves)
    num_others = trial.num_prompt - trial.moves[0].start - num_moved + NUM_CONTINUATION
    return sum(num_others + rung.share * num_moved for rung in rungs)


def _pair_of(measured: Measurement, moves: Sequence[Move]) -> Pair:
    outcomes = measured.outcomes
    return Pair(
        {rung: Measured(outcome.divergence, outcome.residual) for rung, outcome in outcomes.items()},
        {rung.estimator: outcome.distance for rung, outcome in outcomes.items()},
        sources_of(moves),
    )
