"""Trials: prompts that jobs work on beside requests, and how they get and give back their pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

from kvcomm.align.moves import Move
from kvcomm.align.readers import Reader, reader_of
from kvcomm.align.standings import Level
from kvcomm.errors import EngineClosed, kept
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment, token_ids_of
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import Weights
from kvcomm.reuse.finder import MoveFinder
from kvcomm.reuse.idle_work import IdleWork, Job, Steps, Urgency
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION, Case, Exact, Replayer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Approximation:
    """How a request was approximated, for audits.

    Attributes:
        level: whose pairs decided.
        risk: nats; what was expected at most.
    """

    level: Level
    risk: float


@dataclass(eq=False)
class Trial:
    """What a job works on.

    Attributes:
        weights: for which its passes are; once they are gone, the job fails.
        sequence: prompt and answer, whose pages the job holds.
        guess: an answer that exact greedy decoding may give, too; see `Trials.exact_case`.
        served: how the request was approximated, whose exact twin this may be; None: not at all.
        others: further sequences whose pages the job holds.
    """

    namespace: str
    weights: Weights
    segments: tuple[Segment, ...]
    sequence: KVSequence
    num_prompt: int
    policy: ReusePolicy
    guess: tuple[int, ...] = ()
    moves: list[Move] = field(default_factory=list)
    served: Approximation | None = None
    others: list[KVSequence] = field(default_factory=list)

    @property
    def reader(self) -> Reader:
        """Who reads the prompt."""
        return reader_of(self.segments)

    @property
    def sequences(self) -> list[KVSequence]:
        """Every sequence whose pages the job holds."""
        return [self.sequence, *self.others]


class Trials:
    """Makes jobs of trials, and does what all of them begin with. One engine's."""

    def __init__(
        self,
        memory: Memory,
        finder: MoveFinder,
        replayer: Replayer,
        idle: IdleWork,
        *,
        chunk: int,
        end_token_ids: frozenset[int],
    ) -> None:
        """Make one.

        Args:
            chunk: tokens of a prefill pass beside requests.
        """
        self.memory = memory
        self.replayer = replayer
        self.lock = replayer.lock
        self._finder = finder
        self._idle = idle
        self._chunk = chunk
        self._ends = end_token_ids

    def queue(
        self,
        trial: Trial,
        steps: Steps,
        urgency: Urgency,
        *,
        pays_after: float = math.inf,
        can_wait: Callable[[], bool] = lambda: False,
        on_error: Callable[[Exception], None] = lambda error: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Let steps on a trial be done; its pages are given back when they end, or are dropped."""

        def told() -> Steps:
            with closing(self.replayer.serving(trial.weights, steps)) as served:
                try:
                    yield from served
                except Exception as error:
                    on_error(error)
                    raise

        def release() -> None:
            for sequence in trial.sequences:
                sequence.release()
            self._finder.release(trial.moves)
            trial.moves = []
            on_end()

        def pages() -> list[PageIds]:
            return [*(sequence.pages for sequence in trial.sequences), *(move.source_pages for move in trial.moves)]

        self._idle.add(Job(told(), release, pages, urgency, pays_after, can_wait))

    def promise(
        self,
        namespace: str,
        weights: Weights,
        segments: tuple[Segment, ...],
        make: Callable[[Trial], Generator[None, None, Result]],
        policy: ReusePolicy,
    ) -> Future[Result]:
        """Let steps on a prompt be done that somebody waits for; the future gives what they return, or their error."""
        future: Future[Result] = Future()

        def steps(trial: Trial) -> Steps:
            future.set_result((yield from make(trial)))

        def fail(error: Exception) -> None:
            if not future.done():
                future.set_exception(kept(error))

        with self.lock:
            token_ids = token_ids_of(segments)
            sequence = KVSequence(self.memory.pool, token_ids)
            trial = Trial(namespace, weights, segments, sequence, len(token_ids), policy)
            closed = EngineClosed("the engine was closed before it came to this")
            self.queue(trial, steps(trial), Urgency.AWAITED, on_error=fail, on_end=lambda: fail(closed))
        return future

    def find(self, trial: Trial, num_exact: int, before_s: float = math.inf) -> list[Move]:
        """What could be moved into a trial's prompt; the caller keeps it in the trial. Under the lock."""
        return self._finder.find(trial.namespace, trial.segments, num_exact, trial.sequence, before_s=before_s)

    def complete(self, trial: Trial) -> Steps:
        """Take the prompt from the tree, compute exactly what is missing, and find its moves as if none of it were."""
        sequence, num_prompt = trial.sequence, trial.num_prompt
        with self.lock:
            self.share(trial, sequence, num_prompt)
        yield from self.replayer.prefill(sequence.token_ids, sequence, self._chunk)
        with self.lock:
            trial.moves = self.find(trial, 0)

    def share(self, trial: Trial, sequence: KVSequence, num_tokens: int) -> None:
        """Take from the tree what it has of a sequence, and own pages for its first `num_tokens`. Under the lock."""
        match = self.memory.tree.match(trial.namespace, sequence.token_ids[:num_tokens])
        if match.num_tokens > sequence.num_computed:
            sequence.adopt(match.pages, match.num_tokens)
        self.memory.make_writable(sequence, sequence.num_computed, num_tokens)

    def prefill(self, sequence: KVSequence) -> Steps:
        """Compute what is missing of a sequence, whose pages must be writable."""
        yield from self.replayer.prefill(sequence.token_ids, sequence, self._chunk)

    def publish(self, trial: Trial) -> None:
        """Let others use a trial's prompt, which is exact. Under the lock.

        So text that was served approximately gets an exact source.
        """
        sequence, page_size = trial.sequence, self.memory.pool.page_size
        whole = trial.num_prompt - trial.num_prompt % page_size
        self.memory.tree.insert(trial.namespace, sequence.token_ids[:whole], sequence.pages[: whole // page_size])
        self._finder.publish(trial.namespace, trial.segments, sequence, start=0, risk=0.0)

    def case(self, trial: Trial, continuation: Sequence[int], moves: Sequence[Move]) -> Case:
        """A trial's prompt with what follows, into which these moves are possible."""
        return Case(trial.sequence, trial.num_prompt, tuple(continuation[:NUM_CONTINUATION]), tuple(moves))

    def exact_case(self, trial: Trial) -> Generator[None, None, tuple[Case, Exact] | None]:
        """A trial's prompt, which is exact, with its exact greedy answer; None if that has no token.

        One pass tells how far the trial's guess is that answer; what is left is decoded.
        """
        prompt = trial.sequence.token_ids[: trial.num_prompt]
        guess = list(itertools.takewhile(lambda token: token not in self._ends, trial.guess[:NUM_CONTINUATION]))
        sequence = KVSequence(self.memory.pool, [*prompt.tolist(), *guess])
        with self.replayer.borrowed(sequence, trial.sequence, trial.num_prompt - 1, NUM_CONTINUATION + 1 - len(guess)):
            found = self.replayer.agreed(sequence, trial.num_prompt, self._ends, trial.moves)
            yield
            tokens = list(found.token_ids)
            if not found.is_whole:
                sequence.truncate(trial.num_prompt + len(tokens) - 1)
                sequence.append(tokens[-1:])
                for token_id in self.replayer.greedy(sequence, NUM_CONTINUATION - len(tokens), self._ends):
                    tokens.append(token_id)
                    yield
        if not tokens:
            return None
        case = self.case(trial, tokens, trial.moves)
        exact = found.exact
        if exact is None:
            exact = self.replayer.exact(case)
            yield
        return case, exact
