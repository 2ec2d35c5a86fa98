"""Where the damage of moved KV sits: by token of the continuation, and by layer.

`Engine.measure` gives one number per way to reuse a prompt. An `Anatomy` takes the same replay apart: the divergence at
every token of the exact continuation, and how far the KV that is read there is from the exact one, layer by layer. For
evaluations; nothing is served or learned from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcomm.align.ladder import moved_positions
from kvcomm.align.moves import Move
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import DEFAULT_TENANT, Engine, end_token_ids
from kvcomm.engine.prompts import Prompt
from kvcomm.engine.request import NUM_CONTINUATION
from kvcomm.errors import InvalidRequest
from kvcomm.lab.variant import Variant
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.model.live import Weights
from kvcomm.model.runner import Run
from kvcomm.reuse.idle_work import Steps
from kvcomm.reuse.learner import NOTHING, Learner, _Trial
from kvcomm.reuse.replay import Case, Replay, assemble, computed_stretches


class Anatomy(NamedTuple):
    """One way to reuse a prompt.

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
        anatomies: one per variant; None where its estimator knows nothing about some segment of the prompt; none at all
            where nothing of it can be moved.
    """

    exact: Tensor
    anatomies: tuple[Anatomy | None, ...]


def dissect(
    engine: Engine, prompt: Prompt, answer: Iterable[int], variants: Iterable[Variant], *, tenant: str = DEFAULT_TENANT
) -> Future[Dissection]:
    """Replay a prompt, followed by its exact greedy answer, in every way asked for. Done in idle time.

    Args:
        answer: token ids of the exact greedy answer; the first 32 are looked at.

    Raises:
        InvalidRequest: the prompt or the answer is empty.
    """
    segments, tokens = engine.read_prompt(prompt, is_start=True), tuple(answer)[:NUM_CONTINUATION]
    if not tokens:
        raise InvalidRequest("an empty answer cannot be replayed; generate at least one token")
    weights = engine.live.now(closely=True)
    future = _Dissector(engine).dissect(engine.namespace(tenant), weights, segments, tokens, tuple(variants))
    engine._loop.wake()
    return future


class _Dissector(Learner):
    """A second maker of jobs on the parts of an engine."""

    def __init__(self, engine: Engine) -> None:
        layers, reuse = layer_stores(engine.pool, engine.geometry), engine.reuse
        super().__init__(
            engine.memory,
            layers,
            reuse.planner,
            reuse.replayer,
            reuse.idle,
            chunk=engine.config.prefill_chunk,
            end_token_ids=end_token_ids(engine.model, engine.tokenizer),
        )
        self._pool = engine.pool
        self._runner = engine.runner

    def dissect(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        answer: tuple[int, ...],
        variants: Sequence[Variant],
    ) -> Future[Dissection]:
        """See `dissect`."""
        future: Future[Any] = Future()

        def steps(trial: _Trial) -> Steps:
            yield from self._complete(trial)
            case = self._case(trial, answer)
            exact = self._replayer.exact(case)
            yield
            found: list[Anatomy | None] = []
            unchanged: dict[tuple[str, float], Replay] = {}
            for variant in variants if case.moves else ():
                found.append(self._anatomy(trial, case, exact, variant, unchanged))
                yield
            future.set_result(Dissection(exact, tuple(found)))

        self._add_trial(namespace, weights, segments, steps, future)
        return future

    def _anatomy(
        self,
        trial: _Trial,
        case: Case,
        exact: Tensor,
        variant: Variant,
        unchanged: dict[tuple[str, float], Replay],
    ) -> Anatomy | None:
        corrections = self._reuse.corrections(trial.namespace, variant.estimator, case.moves, variant.strength)
        if corrections is None:
            return None
        recomputed = NOTHING
        if variant.share:
            recomputed = self._recomputed(trial, case, exact, variant, unchanged)
        forced = case.forced
        sequence = KVSequence(self._pool, forced)
        with self._replayer.borrowed(sequence, case.sequence, case.moves[0].start, 0):
            assemble(self._memory, self._layers, sequence, case.moves, corrections, with_errors=False)
            stretches = computed_stretches(case.moves, recomputed, len(forced))
            reused = self._runner.forward(_runs(sequence, stretches, len(case.continuation)))
            reused = reused.float().log_softmax(-1)
            errors = self._errors(case, sequence, case.moves)
        divergences = (exact.exp() * (exact - reused)).sum(-1).tolist()
        return Anatomy(
            tuple(each if math.isfinite(each) else math.inf for each in divergences),
            tuple((exact.argmax(-1) == reused.argmax(-1)).tolist()),
            *errors,
        )

    def _errors(
        self, case: Case, sequence: KVSequence, moves: Sequence[Move]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Relative errors of keys and of values, layer by layer. Both stand at the same positions: no turning back."""
        positions = torch.from_numpy(moved_positions(moves)).long()
        true, moved = (
            _slots_at(self._pool.slots(each.pages, case.num_prompt), positions) for each in (case.sequence, sequence)
        )
        keys, values = (
            tuple(_relative(layer[moved].float(), layer[true].float()) for layer in layers)
            for layers in (self._pool.keys, self._pool.values)
        )
        return keys, values


def _runs(sequence: KVSequence, stretches: Sequence[tuple[int, int]], num_logits: int) -> list[Run]:
    """The last stretch is the one that gives logits."""
    return [
        Run(sequence.token_ids[start:end], sequence.pages, start, num_logits if end == sequence.num_tokens else 0)
        for start, end in stretches
    ]


def _slots_at(slots: slice | Tensor, positions: Tensor) -> Tensor:
    return positions + slots.start if isinstance(slots, slice) else slots[positions.to(slots.device)]


def _relative(got: Tensor, true: Tensor) -> float:
    scale = float(true.norm())
    return float((got - true).norm()) / scale if scale else 0.0
