"""Repair: a context whose KV is approximate is healed beside requests, in idle time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future

from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import Weights
from kvcomm.reuse.finder import MoveFinder
from kvcomm.reuse.healing import Healing
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.trials import Trial, Trials

TakeOver = Callable[[Healing], tuple[Segment, ...] | None]
"""Lets whoever owns a sequence go on with its exact twin; returns what the sequence is made of, None: not now."""


class Repairer:
    """Makes the jobs of one engine."""

    def __init__(self, trials: Trials, finder: MoveFinder) -> None:
        self._trials = trials
        self._finder = finder
        self._memory = trials.memory

    def repair(self, namespace: str, weights: Weights, own: KVSequence, take_over: TakeOver) -> Future[bool]:
        """Make a context exact; the future gives whether it is.

        Args:
            own: its sequence.
            take_over: called under the engine's lock with a twin that has caught up.
        """

        def steps(trial: Trial) -> Generator[None, None, bool]:
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
                    if self._put_in_place(namespace, healing, take_over):
                        break
                yield
            is_released = own.num_tokens > 0 and own.num_pages == 0
            return not is_released and own.approximate_from is None

        return self._trials.promise(namespace, weights, (), steps, ReusePolicy.exact())

    def _put_in_place(self, namespace: str, healing: Healing, take_over: TakeOver) -> bool:
        """Let a context that nobody writes go on with its twin, if that has caught up. Under the lock."""
        own, page_size = healing.own, self._memory.pool.page_size
        if own.approximate_from is None or not healing.has_caught_up:
            return False
        segments = take_over(healing)
        if segments is None:
            return False
        whole = own.num_computed - own.num_computed % page_size
        self._memory.tree.insert(namespace, own.token_ids[:whole], own.pages[: whole // page_size])
        self._finder.replace(namespace, segments, own)
        return True
