"""Where the damage of moved KV sits: by token of the continuation, and by layer.

`Engine.measure` gives one number per rung. An `Anatomy` takes the same replay apart: the divergence at every token of
the exact continuation, and how far the KV that is read there is from the exact one, layer by layer. For evaluations;
nothing is served or learned from it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.align.ladder import Rung, moved_positions
from kvcomm.align.moves import edges_of
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Prompt
from kvcomm.memory.sequences import KVSequence
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Case
from kvcomm.reuse.trials import Trial
from kvcomm.tiers.space import DEFAULT_TENANT


class Anatomy(NamedTuple):
    """One rung on one prompt.

    Attributes:
        divergences: KL(exact || reused), nats, at every token of the continuation; infinite where not finite.
        is_same: at which of them both put the same token first.
        key_errors, value_errors: one per layer, norm of moved minus exact over the norm of exact, over all tokens that
            could be moved; recomputed ones count with what they are then.
    """

    divergences: tuple[float, ...]
    is_same: tuple[bool, ...]
    key_errors: tuple[float, ...]
    value_errors: tuple[float, ...]

    @property
    def divergence(self) -> float:
        """Mean over the continuation, nats."""
        return max(0.0, sum(self.divergences) / len(self.divergences))

    @property
    def agreement(self) -> float:
        """Share of the continuation's tokens at which both put the same token first."""
        return sum(self.is_same) / len(self.is_same)


class Dissection(NamedTuple):
    """A prompt, taken apart.

    Attributes:
        exact: log-probabilities over the continuation, [num_continuation, vocab_size] float32.
        anatomies: one per rung; None where its estimator knows nothing about some segment of the prompt; none at all
            where nothing of it can be moved.
    """

    exact: Tensor
    anatomies: tuple[Anatomy | None, ...]


def dissect(
    engine: Engine, prompt: Prompt, answer: Iterable[int], rungs: Iterable[Rung], *, tenant: str = DEFAULT_TENANT
) -> Future[Dissection]:
    """Replay a prompt, followed by its exact greedy answer, at every rung asked for. Done in idle time.

    Args:
        answer: token ids of the exact greedy answer; the first 32 are looked at.

    Raises:
        InvalidRequest: the prompt or the answer is empty, or a rung names what the engine does not have.
    """
    segments, tokens, wanted = engine.read_prompt(prompt, is_start=True), tuple(answer), tuple(rungs)
    if not tokens:
        raise InvalidRequest("an empty answer cannot be replayed; generate at least one token")
    engine.reuse.parts.planner.require_known(wanted)
    dissector = _Dissector(engine)

    def steps(trial: Trial) -> Generator[None, None, Dissection]:
        return (yield from dissector.steps(trial, tokens, wanted))

    namespace, weights = engine.namespace(tenant), engine.live.now(closely=True)
    return engine.reuse.parts.trials.promise(namespace, weights, segments, steps, ReusePolicy.exact())


class _Dissector:
    """Takes replays of one engine apart."""

    def __init__(self, engine: Engine) -> None:
        self._memory = engine.memory
        self._layers = layer_stores(engine.pool, engine.geometry)
        self._parts = engine.reuse.parts

    def steps(self, trial: Trial, answer: Sequence[int], rungs: Sequence[Rung]) -> Generator[None, None, Dissection]:
        """Pass by pass: the exact side, then every rung."""
        trials, replayer = self._parts.trials, self._parts.replayer
        yield from trials.complete(trial)
        case = trials.case(trial, answer, trial.moves)
        exact = replayer.exact(case)
        yield
        found: dict[Rung, Anatomy] = {}

        def take_apart(rung: Rung, sequence: KVSequence, reused: Tensor) -> None:
            found[rung] = self._anatomy(case, exact.log_probs, sequence, reused)

        if case.moves:
            with trials.lock:
                known = self._parts.planner.known(trial.namespace, rungs, edges_of(case.moves))
                weights = self._parts.book.heads(trial.namespace).weights
            yield from replayer.measure(case, exact, rungs, known, weights, take_apart)
        return Dissection(exact.log_probs, tuple(found.get(rung) for rung in rungs) if case.moves else ())

    def _anatomy(self, case: Case, exact: Tensor, sequence: KVSequence, reused: Tensor) -> Anatomy:
        errors = self._errors(case, sequence)
        divergences = (exact.exp() * (exact - reused)).sum(-1).tolist()
        return Anatomy(
            tuple(each if math.isfinite(each) else math.inf for each in divergences),
            tuple((exact.argmax(-1) == reused.argmax(-1)).tolist()),
            *errors,
        )

    def _errors(self, case: Case, sequence: KVSequence) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Relative errors of keys and of values, layer by layer. Both stand at the same positions: no turning back."""
        pool, positions = self._memory.pool, torch.from_numpy(moved_positions(case.moves)).long()
        true, moved = (
            _slots_at(pool.slots(each.pages, case.num_prompt), positions) for each in (case.sequence, sequence)
        )
        keys, values = (
            tuple(_relative(layer[moved].float(), layer[true].float()) for layer in layers)
            for layers in (pool.keys, pool.values)
        )
        return keys, values


def _slots_at(slots: slice | Tensor, positions: Tensor) -> Tensor:
    return positions + slots.start if isinstance(slots, slice) else slots[positions.to(slots.device)]


def _relative(got: Tensor, true: Tensor) -> float:
    scale = float(true.norm())
    return float((got - true).norm()) / scale if scale else 0.0
