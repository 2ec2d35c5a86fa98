"""Repair: the exact twin of a context's KV is computed beside requests and put in place of an approximate one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.trials import Trial, Trials


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


class Repairer:
    """Makes the jobs of one engine."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._memory = trials.memory

    def repair(self, namespace: str, weights: Weights, context: Repairable) -> Future[bool]:
        """Make a context exact; the future gives whether it is."""

        def steps(trial: Trial) -> Generator[None, None, bool]:
            while True:
                with self._trials.lock:
                    own = context.sequence
                    if own.approximate_from is None or not self._grow(trial, own.token_ids[: own.num_computed]):
                        break
                yield from self._trials.prefill(trial.sequence)
                with self._trials.lock:
                    if not context.busy and self._put_in_place(trial, context):
                        break
                yield
            return not context.released and context.sequence.approximate_from is None

        return self._trials.promise(namespace, weights, (), steps, ReusePolicy.exact())

    def _grow(self, trial: Trial, wanted: IntArray) -> bool:
        """Let a twin have at least these tokens; False if that makes no sense any more. Under the lock."""
        twin = trial.sequence
        if not len(wanted) or not np.array_equal(wanted[: twin.num_tokens], twin.token_ids):
            return False
        twin.append(wanted[twin.num_tokens :])
        self._trials.share(trial, twin, twin.num_tokens)
        return True

    def _put_in_place(self, trial: Trial, context: Repairable) -> bool:
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
