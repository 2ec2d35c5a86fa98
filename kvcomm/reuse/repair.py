"""Repair: a context whose KV is approximate is healed beside requests, in idle time."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from typing import Protocol

from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.model.live import Weights
from kvcomm.reuse.finder import MoveFinder
from kvcomm.reuse.healing import Healing
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.trials import Trial, Trials


class Repairable(Protocol):
    """A context, as far as repairing it goes."""

    @property
    def sequence(self) -> KVSequence:
        """Its tokens and pages."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What it was built from."""
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

    def __init__(self, trials: Trials, finder: MoveFinder) -> None:
        self._trials = trials
        self._finder = finder
        self._memory = trials.memory

    def repair(self, namespace: str, weights: Weights, context: Repairable) -> Future[bool]:
        """Make a context exact; the future gives whether it is."""

        def steps(trial: Trial) -> Generator[None, None, bool]:
            own = context.sequence
            healing = Healing(self._memory, namespace, own)
            trial.sequence = healing.twin
            with self._trials.lock:
                if own.approximate_from is not None:
                    healing.begin(own.num_computed)
            while True:
                with self._trials.lock:
                    if own.approximate_from is None or not own.num_computed or not healing.grow(own.num_computed):
                        break
                yield from self._trials.prefill(healing.twin)
                with self._trials.lock:
                    if self._put_in_place(namespace, healing, context):
                        break
                yield
            return not context.released and own.approximate_from is None

        return self._trials.promise(namespace, weights, (), steps, ReusePolicy.exact())

    def _put_in_place(self, namespace: str, healing: Healing, context: Repairable) -> bool:
        """Let a context that nobody writes go on with its twin, if that has caught up. Under the lock."""
        own, page_size = healing.own, self._memory.pool.page_size
        if context.busy or own.approximate_from is None or not healing.has_caught_up:
            return False
        healing.put_in_place()
        context.repaired()
        whole = own.num_computed - own.num_computed % page_size
        self._memory.tree.insert(namespace, own.token_ids[:whole], own.pages[: whole // page_size])
        self._finder.replace(namespace, context.segments, own)
        return True
