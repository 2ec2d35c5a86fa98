"""Audits: approximate requests are computed exactly afterwards and held against what was served.

A sample of them, and all of a young reader's. What is found moves the working delta and may trip a breaker
(`align.watch`); the exact twin then teaches as any exact prompt does.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from kvcomm.align.bound import Bound
from kvcomm.align.levels import ReaderBook
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Audit
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.idle_work import Steps, Urgency
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Case
from kvcomm.reuse.trials import Trial, Trials

logger = logging.getLogger("kvcomm.audit")


class Auditor:
    """Makes the audits of one engine.

    Attributes:
        num_audits, num_violations: over all tenants.
    """

    def __init__(self, trials: Trials, book: ReaderBook, study: Callable[[Trial], None]) -> None:
        """Make one.

        Args:
            study: takes over a trial whose prompt is exact, to learn from it. Called under the lock.
        """
        self.num_audits = 0
        self.num_violations = 0
        self._trials = trials
        self._book = book
        self._study = study
        self._random = random.Random(0)

    def is_due(self, namespace: str, reader: Reader, policy: ReusePolicy) -> bool:
        """Whether an approximate request that was just served is to be audited. Under the lock."""
        if not policy.audit:
            return False
        return self._book.standing(namespace, reader).is_young or self._random.random() < policy.audit

    def queue(self, trial: Trial) -> None:
        """Audit a request whose pages the trial holds. Under the lock.

        It can wait while nothing is accepted on the pairs that decided about it: there is nothing that it could stop.
        """
        assert trial.served is not None
        namespace, reader, level = trial.namespace, trial.reader, trial.served.level
        bound = Bound(trial.policy.max_divergence, trial.policy.delta)
        self._trials.queue(
            trial,
            self._steps(trial),
            Urgency.AUDIT,
            can_wait=lambda: self._book.is_stopped(namespace, reader, level, bound),
        )

    def _steps(self, trial: Trial) -> Steps:
        trials = self._trials
        with trials.lock:
            served = trial.sequence
            trial.others.append(served)
            trial.sequence = KVSequence(trials.memory.pool, served.token_ids[: trial.num_prompt])
            trials.share(trial, trial.sequence, trial.num_prompt)
        yield from trials.prefill(trial.sequence)
        found = yield from trials.exact_case(trial)
        if found is None:
            return  # the exact answer ends at once: there is nothing to hold against it
        case, exact = found
        divergence = trials.replayer.served(Case(served, trial.num_prompt, case.continuation, ()), exact.log_probs)
        with trials.lock:
            self._record(trial, divergence)
            trials.publish(trial)
            if trial.moves and trial.policy.learn:
                self._study(self._handed_over(trial, case.continuation))

    def _handed_over(self, trial: Trial, continuation: tuple[int, ...]) -> Trial:
        """A trial that holds the exact twin and the moves from now on."""
        taken = Trial(
            trial.namespace,
            trial.weights,
            trial.segments,
            trial.sequence,
            trial.num_prompt,
            trial.policy,
            guess=continuation,
            moves=trial.moves,
            served=trial.served,
        )
        trial.sequence, trial.moves = KVSequence(self._trials.memory.pool), []
        return taken

    def _record(self, trial: Trial, divergence: float) -> None:
        assert trial.served is not None
        bound = Bound(trial.policy.max_divergence, trial.policy.delta)
        audit = Audit(time.monotonic(), divergence, trial.served.risk, bound, trial.served.level)
        self.num_audits += 1
        self.num_violations += audit.is_violation
        if self._book.audited(trial.namespace, trial.reader, audit):
            logger.warning(
                "the bound of %g nats at confidence %g does not hold for reader %s on pairs of level %s",
                bound.max_divergence,
                bound.confidence,
                trial.reader.digest[:12],
                audit.level,
            )
