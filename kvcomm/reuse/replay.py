"""Replays: what a prompt's answer would have been worth on moved KV.

Next to an exact sequence a scratch copy is made in which segments are moved and corrected, the tokens of a rung, glue
and tail are computed, and the exact continuation is forced; the divergence is taken from both logits. Used for
calibration, for audits and for measurements, always on the engine's thread and never on a request's own pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.align.attention_mass import AttentionMass, damaged_layers, looking_layers, looking_rows
from kvcomm.align.estimators import Correction, Written
from kvcomm.align.importance import importance
from kvcomm.align.ladder import Rung, moved_positions
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore
from kvcomm.align.probes import Probes
from kvcomm.align.spans import place_of
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.model.live import Weights
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.reuse.choosing import Chooser, View
from kvcomm.reuse.idle_work import Steps
from kvcomm.reuse.stretches import computed_stretches, rung_stretches

NUM_CONTINUATION = 32
"""Tokens over which a divergence is taken."""
NOTHING: IntArray = np.empty(0, dtype=np.int32)
"""No positions."""


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


class Look(NamedTuple):
    """By what rungs choose, where all is moved.

    Attributes:
        attention: [num_heads, number of moved tokens], of the prompt's tail; see `importance`.
        errors: [number of moved tokens], expected.
    """

    attention: Tensor
    errors: Tensor

    def scores(self, head_weights: Sequence[float] | None) -> Tensor:
        """How much each moved token is worth recomputing, [number of moved tokens]."""
        return importance(self.attention, self.errors, head_weights)


class Exact(NamedTuple):
    """The exact side of a case.

    Attributes:
        log_probs: over the continuation, [num_continuation, vocab_size] float32.
        attended: [number of moved tokens], what the answer's tokens attend to, in the layers that carry damage; None
            where nothing could be moved.
    """

    log_probs: Tensor
    attended: Tensor | None


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


class Agreed(NamedTuple):
    """Tokens that greedy decoding gives.

    Attributes:
        is_whole: whether the answer ends there, or as many are known as a divergence is taken over.
        exact: the exact side of a case with this continuation, where it is known by now.
    """

    token_ids: tuple[int, ...]
    is_whole: bool
    exact: Exact | None


class Measurement(NamedTuple):
    """What rungs gave on a case, and by estimator what they chose by, where they did."""

    outcomes: dict[Rung, Outcome]
    looks: dict[str, Look]


OnRung = Callable[[Rung, KVSequence, Tensor], None]
"""Told of a rung, the scratch copy as the rung leaves it, and its log-probabilities."""


class Replayer:
    """Computes exact and moved twins of a case."""

    def __init__(
        self,
        memory: Memory,
        runner: ModelRunner,
        layers: Sequence[LayerStore],
        choosers: Mapping[str, Chooser],
        lock: RLock,
    ) -> None:
        """Make one.

        Args:
            choosers: by name; others may be added later.
        """
        self.choosers = choosers
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

    def exact(self, case: Case) -> Exact:
        """What the exact sequence gives.

        Raises:
            PoolExhausted: no pages for the scratch copy.
        """
        forced, start = case.forced, case.num_prompt - 1
        mass = AttentionMass(self._layers, damaged_layers(len(self._layers)), start, len(forced))
        with self._scratch(case, forced, start) as sequence:
            log_probs = self.log_probs(case, sequence, [(start, len(forced))], mass)
        return Exact(log_probs, _by_head(mass, case.moves).sum(0) if case.moves else None)

    def measure(
        self,
        case: Case,
        exact: Exact,
        rungs: Sequence[Rung],
        corrections: Mapping[str, Sequence[Correction]],
        head_weights: Sequence[float] | None,
        on_rung: OnRung = lambda rung, sequence, log_probs: None,
    ) -> Generator[None, None, Measurement]:
        """What every rung gives on a case, pass by pass; those of estimators without corrections are left out.

        Raises:
            PoolExhausted: no pages for a scratch copy.
        """
        found = Measurement({}, {})
        wanted = [rung for rung in rungs if rung.estimator in corrections]
        for estimator, name in dict.fromkeys((rung.estimator, rung.chooser) for rung in wanted):
            ladder = [rung for rung in wanted if (rung.estimator, rung.chooser) == (estimator, name)]
            replay = _Replay(self, case, exact.log_probs, corrections[estimator], self.choosers[name], on_rung)
            if self.choosers[name].looks:
                yield from replay.climb(sorted(ladder, key=lambda rung: rung.share), head_weights, found)
                continue
            for rung in ladder:
                found.outcomes[rung] = replay.at_once(rung)
                yield
        return found

    def tail_mass(self, case: Case) -> AttentionMass:
        """Takes in what the prompt's tail attends to."""
        rows = looking_rows(case.moves[-1].end, case.num_prompt)
        return AttentionMass(self._layers, looking_layers(len(self._layers)), *rows)

    @contextmanager
    def moved(
        self, case: Case, corrections: Sequence[Correction], *, with_errors: bool
    ) -> Iterator[tuple[KVSequence, Written]]:
        """A scratch copy with the case's moves moved; behind the first of them nothing else is computed."""
        with self._scratch(case, case.forced, case.moves[0].start) as sequence:
            yield (
                sequence,
                assemble(self._memory, self._layers, sequence, case.moves, corrections, with_errors=with_errors),
            )

    def probes(self, sequence: KVSequence, positions: IntArray) -> Probes | None:
        """The estimates that stand at some positions; None for no positions."""
        return Probes(self._pool, self._layers, sequence.pages, positions) if len(positions) else None

    def served(self, case: Case, exact: Tensor) -> float:
        """Divergence of a sequence as it is, moved KV and all, from the exact log-probabilities."""
        forced = case.forced
        with self._scratch(case, forced, case.num_prompt - 1) as sequence:
            return divergence_of(exact, self.log_probs(case, sequence, [(case.num_prompt - 1, len(forced))]))

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

    def prefill(self, case_tokens: IntArray, sequence: KVSequence, chunk: int) -> Iterator[None]:
        """Compute what is missing of a sequence, `chunk` tokens a step; its pages must be writable."""
        while sequence.num_computed < len(case_tokens):
            start, end = sequence.num_computed, min(sequence.num_computed + chunk, len(case_tokens))
            self._runner.forward([Run(case_tokens[start:end], sequence.pages, start)])
            sequence.count(end)
            yield

    def agreed(self, sequence: KVSequence, num_prompt: int, ends: frozenset[int], moves: Sequence[Move]) -> Agreed:
        """How far what stands behind a prompt is its greedy continuation, in one pass.

        Args:
            sequence: prompt and a guess at what follows; all but the prompt's last token is computed before, and the
                guess's tokens are afterwards.
            moves: of the case, for which the exact side is given if the guess is right.
        """
        start = num_prompt - 1
        tokens = sequence.token_ids[start:]
        num_guessed = len(tokens) - 1
        mass = AttentionMass(self._layers, damaged_layers(len(self._layers)), start, start + num_guessed)
        logits = self._forward(sequence, [(start, sequence.num_tokens)], len(tokens), mass if num_guessed else None)
        sequence.count(sequence.num_tokens)
        drawn, guess = logits.argmax(-1).tolist(), tokens[1:].tolist()
        wrong = (at for at, (one, other) in enumerate(zip(drawn, guess, strict=False)) if one != other)
        num_right = next(wrong, num_guessed)
        is_whole = drawn[num_right] in ends or num_right >= NUM_CONTINUATION
        if not is_whole:
            found = (*guess[:num_right], drawn[num_right])
            return Agreed(found, len(found) >= NUM_CONTINUATION, None)
        if num_right < num_guessed or not num_right:
            return Agreed(tuple(guess[:num_right]), True, None)
        log_probs = logits[:num_right].float().log_softmax(-1)
        return Agreed(tuple(guess), True, Exact(log_probs, _by_head(mass, moves).sum(0) if moves else None))

    def greedy(self, sequence: KVSequence, num_tokens: int, ends: frozenset[int]) -> Iterator[int]:
        """Decode greedily behind a sequence of which all but the last token is computed; its pages must be writable."""
        for _ in range(num_tokens):
            start = sequence.num_tokens - 1
            logits = self._runner.forward([Run(sequence.token_ids[start:], sequence.pages, start)])
            sequence.count(sequence.num_tokens)
            token_id = int(logits[0].argmax())
            if token_id in ends:
                return
            sequence.append([token_id])
            yield token_id

    def log_probs(
        self,
        case: Case,
        sequence: KVSequence,
        stretches: Sequence[tuple[int, int]],
        mass: AttentionMass | None = None,
    ) -> Tensor:
        """Log-probabilities over the continuation, which must end the last stretch; `mass` looks at that one."""
        logits = self._forward(sequence, stretches, len(case.continuation), mass)
        return logits.float().log_softmax(-1)

    def _forward(
        self,
        sequence: KVSequence,
        stretches: Sequence[tuple[int, int]],
        num_logits: int,
        mass: AttentionMass | None = None,
    ) -> Tensor:
        """One pass over stretches of a sequence; logits of the last rows, `mass` looks at the last stretch."""
        runs = [
            Run(sequence.token_ids[start:end], sequence.pages, start, num_logits if end == sequence.num_tokens else 0)
            for start, end in stretches
        ]
        last = runs[-1]
        row = sum(len(run.token_ids) for run in runs[:-1])
        slots = self._pool.slots(sequence.pages, last.end)
        watch = None if mass is None else mass.watch(slots, row, last.start, last.end)
        return self._runner.forward(runs, watch=watch)


@dataclass(frozen=True, eq=False)
class _Replay:
    """One case moved by one estimator, and what chooses the tokens that are computed after all.

    Attributes:
        exact: log-probabilities.
        corrections: one per move.
    """

    replayer: Replayer
    case: Case
    exact: Tensor
    corrections: Sequence[Correction]
    chooser: Chooser
    on_rung: OnRung

    def climb(self, ladder: Sequence[Rung], head_weights: Sequence[float] | None, found: Measurement) -> Steps:
        """As a request does it: a first pass that looks, then rung by rung, the cheapest first, into what is found.

        A rung computes all tokens of those before it, so what these left behind does not show.
        """
        replayer, case = self.replayer, self.case
        with replayer.moved(case, self.corrections, with_errors=True) as (sequence, written):
            mass = replayer.tail_mass(case)
            log_probs = replayer.log_probs(case, sequence, self._first(NOTHING), mass)
            yield
            scores = None
            if written.errors is not None:
                look = found.looks[ladder[0].estimator] = Look(_by_head(mass, case.moves), written.errors)
                scores = look.scores(head_weights)
            chosen = [self._choose(rung, scores) for rung in ladder]
            probes = [replayer.probes(sequence, positions) for positions in chosen]
            for rung, positions, probe in zip(ladder, chosen, probes, strict=True):
                if len(positions):
                    stretches = rung_stretches(case.moves, positions, sequence.num_tokens)
                    log_probs = replayer.log_probs(case, sequence, stretches)
                    yield
                found.outcomes[rung] = self._outcome(log_probs, written, probe, len(positions))
                self.on_rung(rung, sequence, log_probs)

    def at_once(self, rung: Rung) -> Outcome:
        """With a chooser that need not look: one pass."""
        replayer, positions = self.replayer, self._choose(rung, None)
        with replayer.moved(self.case, self.corrections, with_errors=False) as (sequence, written):
            probes = replayer.probes(sequence, positions)
            log_probs = replayer.log_probs(self.case, sequence, self._first(positions))
            self.on_rung(rung, sequence, log_probs)
            return self._outcome(log_probs, written, probes, len(positions))

    def _first(self, positions: IntArray) -> list[tuple[int, int]]:
        return computed_stretches(self.case.moves, positions, len(self.case.forced))

    def _choose(self, rung: Rung, scores: Tensor | None) -> IntArray:
        """The moved positions that a rung computes after all, ascending."""
        if not rung.share:
            return NOTHING
        case = self.case
        view = View(case.moves, case.moves[0].start, case.sequence, scores, exact=case.sequence)
        return self.chooser.choose(view, rung.share)

    def _outcome(self, log_probs: Tensor, written: Written, probes: Probes | None, num_recomputed: int) -> Outcome:
        agreement = float((self.exact.argmax(-1) == log_probs.argmax(-1)).float().mean())
        residual = None if probes is None else probes.residual()
        return Outcome(divergence_of(self.exact, log_probs), agreement, written.distance, residual, num_recomputed)


def _by_head(mass: AttentionMass, moves: Sequence[Move]) -> Tensor:
    """[num_heads, number of moved tokens]."""
    return mass.by_head(torch.from_numpy(moved_positions(moves)).long())


def divergence_of(exact: Tensor, got: Tensor) -> float:
    """Mean KL(exact || got) over rows of log-probabilities, nats; infinite where either is not finite."""
    value = float((exact.exp() * (exact - got)).sum(-1).mean())
    return max(value, 0.0) if math.isfinite(value) else math.inf


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
