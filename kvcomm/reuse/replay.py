"""Replays: what a prompt's answer would have been worth on moved KV.

Next to an exact sequence a scratch copy is made in which segments are moved and corrected, the tokens of a rung, glue
and tail are computed, and the exact continuation is forced; the divergence is taken from both logits. Used for
calibration, for audits and for measurements, always on the engine's thread and never on a request's own pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.attention_mass import AttentionMass, damaged_layers, looking_layers
from kvcomm.align.estimators import Correction, Written
from kvcomm.align.importance import importance
from kvcomm.align.ladder import moved_positions
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.probes import Probes
from kvcomm.align.spans import place_of, read_span
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.reuse.idle_work import Steps


class Outcome(NamedTuple):
    """What one replay gave.

    Attributes:
        divergence: mean KL(exact || reused), nats, over the continuation.
        agreement: share of the continuation's tokens at which both put the same token first.
        distance: of the text from what the estimator knows.
        residual: of the recomputed tokens; None where none were.
        num_recomputed: moved tokens that were computed after all.
    """

    divergence: float
    agreement: float
    distance: float
    residual: float | None
    num_recomputed: int


class Replay(NamedTuple):
    """An outcome, and by what rungs choose.

    Attributes:
        attention: [num_heads, number of moved tokens], of the prompt's last token; see `importance`.
        errors: [number of moved tokens], expected.
    """

    outcome: Outcome
    attention: Tensor
    errors: Tensor

    def scores(self, head_weights: Sequence[float] | None) -> Tensor:
        """How much each moved token is worth recomputing, [number of moved tokens]."""
        return importance(self.attention, self.errors, head_weights)


@dataclass(frozen=True, eq=False)
class Case:
    """An exact prompt, what followed, and what could have been moved into it.

    Attributes:
        sequence: prompt and continuation; the KV of the prompt is computed, exact, and retained by it.
        num_prompt: tokens of the prompt.
        continuation: token ids of the exact greedy answer, at most NUM_CONTINUATION, at least 1.
        moves: ascending, disjoint, inside the prompt.
    """

    sequence: KVSequence
    num_prompt: int
    continuation: tuple[int, ...]
    moves: tuple[Move, ...]

    @property
    def forced(self) -> IntArray:
        """Prompt and continuation without its last token, whose successor is not looked at."""
        prompt = self.sequence.token_ids[: self.num_prompt]
        return np.concatenate([prompt, np.array(self.continuation[:-1], dtype=np.int32)])


class Replayer:
    """Computes exact and moved twins of a case."""

    def __init__(self, memory: Memory, runner: ModelRunner, layers: Sequence[LayerStore], lock: RLock) -> None:
        self._memory = memory
        self._pool = memory.pool
        self._runner = runner
        self._layers = layers
        self.lock = lock
        self._scratches: list[KVSequence] = []

    def pages_held(self) -> Iterator[PageIds]:
        """Page references of scratch copies in use, for integrity checks."""
        for sequence in self._scratches:
            yield sequence.pages

    def serving(self, weights: Weights, steps: Steps) -> Steps:
        """The same steps; every pass in them is for these weights, and fails if there are others (WeightsChanged)."""
        with closing(steps):
            while True:
                with self._runner.serving(weights, closely=True):
                    try:
                        next(steps)
                    except StopIteration:
                        return
                yield

    def exact(self, case: Case) -> Tensor:
        """Log-probabilities over the continuation, [num_continuation, vocab_size] float32.

        Raises:
            PoolExhausted: no pages for the scratch copy.
        """
        forced = case.forced
        with self._scratch(case, forced, case.num_prompt - 1) as sequence:
            return self._log_probs(case, sequence, [(case.num_prompt - 1, len(forced))])

    def moved(
        self, case: Case, exact: Tensor, corrections: Sequence[Correction], moves: Sequence[Move], recomputed: IntArray
    ) -> Replay:
        """Replay with `moves` (some of the case's) moved and the positions `recomputed` among them computed.

        Raises:
            PoolExhausted: no pages for the scratch copy.
        """
        forced = case.forced
        with self._scratch(case, forced, moves[0].start) as sequence:
            written = assemble(self._memory, self._layers, sequence, moves, corrections, with_errors=True)
            assert written.errors is not None
            probes = Probes(self._pool, self._layers, sequence.pages, recomputed) if len(recomputed) else None
            last = AttentionMass(self._layers, looking_layers(len(self._layers)), case.num_prompt - 1, case.num_prompt)
            got = self._log_probs(case, sequence, computed_stretches(moves, recomputed, len(forced)), last)
            residual = None if probes is None else probes.residual()
        agreement = (exact.argmax(-1) == got.argmax(-1)).float().mean()
        outcome = Outcome(_divergence(exact, got), float(agreement), written.distance, residual, len(recomputed))
        return Replay(outcome, last.by_head(torch.from_numpy(moved_positions(moves)).long()), written.errors)

    def attended(self, case: Case, moves: Sequence[Move]) -> Tensor:
        """What the exact answer's tokens attend to, in the layers that carry damage: [number of moved tokens].

        Raises:
            PoolExhausted: no pages for the scratch copy.
        """
        forced, start = case.forced, case.num_prompt - 1
        mass = AttentionMass(self._layers, damaged_layers(len(self._layers)), start, len(forced))
        with self._scratch(case, forced, start) as sequence:
            self._log_probs(case, sequence, [(start, len(forced))], mass)
        return mass.by_head(torch.from_numpy(moved_positions(moves)).long()).sum(0)

    def served(self, case: Case, exact: Tensor) -> float:
        """Divergence of a sequence as it is, moved KV and all, from the exact log-probabilities."""
        forced = case.forced
        with self._scratch(case, forced, case.num_prompt - 1) as sequence:
            return _divergence(exact, self._log_probs(case, sequence, [(case.num_prompt - 1, len(forced))]))

    @contextmanager
    def borrowed(self, sequence: KVSequence, owner: KVSequence, num_shared: int, num_more: int) -> Iterator[None]:
        """Let an empty `sequence` share the first tokens' KV of its owner and own room for the rest and more tokens."""
        try:
            with self.lock:
                self._scratches.append(sequence)
                sequence.adopt(owner.pages[: -(-num_shared // self._pool.page_size)], num_shared)
                self._memory.make_writable(sequence, num_shared, sequence.num_tokens + num_more)
            yield
        finally:
            with self.lock:
                self._scratches.remove(sequence)
                sequence.release()

    @contextmanager
    def _scratch(self, case: Case, tokens: IntArray, num_shared: int) -> Iterator[KVSequence]:
        """A copy of the case that shares the exact KV of the first tokens and owns the rest."""
        sequence = KVSequence(self._pool, tokens)
        with self.borrowed(sequence, case.sequence, num_shared, 0):
            yield sequence

    def deviations(self, case: Case) -> Tensor:
        """How far every moved token's KV in the second layer is from the exact one, [number of moved tokens].

        That layer's exact KV needs no more than one layer of computation; here it is read from the exact sequence.
        """
        return deviations(self._memory, self._layers, case.sequence, case.moves)

    def prefill(self, case_tokens: IntArray, sequence: KVSequence, chunk: int) -> Iterator[None]:
        """Compute what is missing of a sequence, `chunk` tokens a step; its pages must be writable."""
        while sequence.num_computed < len(case_tokens):
            start, end = sequence.num_computed, min(sequence.num_computed + chunk, len(case_tokens))
            self._runner.forward([Run(case_tokens[start:end], sequence.pages, start)])
            sequence.num_computed = end
            yield

    def greedy(self, sequence: KVSequence, num_tokens: int, ends: frozenset[int]) -> Iterator[int]:
        """Decode greedily behind a sequence of which all but the last token is computed; its pages must be writable."""
        for _ in range(num_tokens):
            start = sequence.num_tokens - 1
            logits = self._runner.forward([Run(sequence.token_ids[start:], sequence.pages, start)])
            sequence.num_computed = sequence.num_tokens
            token_id = int(logits[0].argmax())
            if token_id in ends:
                return
            sequence.append([token_id])
            yield token_id

    def _log_probs(
        self,
        case: Case,
        sequence: KVSequence,
        stretches: Sequence[tuple[int, int]],
        mass: AttentionMass | None = None,
    ) -> Tensor:
        """Log-probabilities over the continuation, which must end the last stretch; `mass` looks at that one."""
        num_logits = len(case.continuation)
        runs = [
            Run(sequence.token_ids[start:end], sequence.pages, start, num_logits if end == sequence.num_tokens else 0)
            for start, end in stretches
        ]
        last = runs[-1]
        row = sum(len(run.token_ids) for run in runs[:-1])
        slots = self._pool.slots(sequence.pages, last.end)
        watch = None if mass is None else mass.watch(slots, row, last.start, last.end)
        return self._runner.forward(runs, watch=watch).float().log_softmax(-1)


def _divergence(exact: Tensor, got: Tensor) -> float:
    """Mean KL(exact || got) over rows of log-probabilities, nats; infinite where either is not finite."""
    value = float((exact.exp() * (exact - got)).sum(-1).mean())
    return max(value, 0.0) if math.isfinite(value) else math.inf


def deviations(memory: Memory, layers: Sequence[LayerStore], exact: KVSequence, moves: Sequence[Move]) -> Tensor:
    """Of every moved token's KV in the second layer from that of an exact sequence, [number of moved tokens]."""
    scores = []
    for move in moves:
        truth = place_of(memory.pool, exact.pages, move.start, move.num_tokens, position=move.start)
        true, moved = (read_span(layers, place, [1]) for place in (truth, move.source))
        difference = torch.cat((true.keys[0] - moved.keys[0], true.values[0] - moved.values[0]), dim=-1)
        scores.append(difference.flatten(1).norm(dim=-1))
    return torch.cat(scores)


def assemble(
    memory: Memory,
    layers: Sequence[LayerStore],
    sequence: KVSequence,
    moves: Sequence[Move],
    corrections: Sequence[Correction],
    *,
    with_errors: bool,
) -> Written:
    """Write the moved KV into a sequence's own pages; the largest distance, and the expected errors of all tokens."""
    found = []
    for move, correction in zip(moves, corrections, strict=True):
        target = place_of(memory.pool, sequence.pages, move.start, move.num_tokens, position=move.start)
        found.append(correction.write(layers, move, target, with_errors=with_errors))
    errors = [each.errors for each in found if each.errors is not None]
    return Written(max(each.distance for each in found), torch.cat(errors) if with_errors else None)


def computed_stretches(moves: Sequence[Move], recomputed: IntArray, num_tokens: int) -> list[tuple[int, int]]:
    """`[start, end)` of what is computed from the first move on: everything but what stays moved."""
    computed = np.ones(num_tokens, dtype=bool)
    computed[: moves[0].start] = False
    for move in moves:
        computed[move.start : move.end] = False
    computed[recomputed] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([False], computed, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
