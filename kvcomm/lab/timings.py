"""Measurements of an engine on its own model: cached prefixes, decoding, forks, branches, snapshots.

Every function takes a ready engine, does one thing and returns what it took, by the wall clock of a caller; how often
to repeat it, and what to compare it with, is the caller's matter. Timings mean something on an engine that has nothing
else to do. Functions that need a cold cache clear it first; contexts made here are released again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest

TakeTokens = Callable[[int], list[int]]
"""Gives a prompt of so many tokens, another one in every call."""

NUM_WARM_UP_TOKENS = 8

MAX_DRAWS = 1000
"""Prompts drawn at most in search of different first tokens."""


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity, in order; at least one."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, interpolated linearly."""
        low, high = np.quantile(self.values, (0.25, 0.75))
        return float(low), float(high)

    def per(self, other: Samples) -> Samples:
        """Ratios of values measured side by side.

        Raises:
            ValueError: different numbers of values.
        """
        return Samples(tuple(own / others for own, others in zip(self.values, other.values, strict=True)))

    def rate(self, num_units: int) -> Samples:
        """Units per second, of values that are seconds for `num_units`."""
        return Samples(tuple(num_units / value for value in self.values))

    def scaled(self, factor: float) -> Samples:
        """Every value times `factor`."""
        return Samples(tuple(value * factor for value in self.values))


@dataclass(frozen=True)
class PrefixHit:
    """Seconds to the first token of the same length of prompt, unseen and with its beginning in the cache.

    `cached_s` is the median of several prompts, because one is over so soon that any other process shows in it.
    """

    cold_s: float
    cached_s: float
    num_cached_tokens: int


@dataclass(frozen=True)
class ForkCost:
    """Seconds of each fork of one context, and bytes of KV that all of them copied."""

    fork_s: Samples
    bytes_copied: int


@dataclass(frozen=True)
class BranchCost:
    """One parent continued by several branches at once.

    Attributes:
        prefill_s: computing the parent.
        decode_s: forking it and generating every branch.
        pool_bytes: pages in use at the end, parent and branches, beyond those in use before.
        expected_bytes: parent + one own tail for each branch + one page for each.
        answers: generated tokens of each branch.
    """

    prefill_s: float
    decode_s: float
    pool_bytes: int
    expected_bytes: int
    answers: tuple[tuple[int, ...], ...]

    @property
    def total_s(self) -> float:
        """From the parent's tokens to the last branch's last token."""
        return self.prefill_s + self.decode_s


@dataclass(frozen=True)
class RestoreCost:
    """Seconds to have a context again: computed, or read from a snapshot whose file the system has cached."""

    recompute_s: float
    restore_s: float
    file_bytes: int


def random_tokens(engine: Engine, *, seed: int = 0) -> TakeTokens:
    """Prompts of uniformly random ordinary tokens (no special ones), the same ones for the same seed."""
    tokenizer = engine.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = np.array([i for i in range(min(len(tokenizer), engine.vocab_size)) if i not in special])
    generator = np.random.default_rng(seed)

    def take(num_tokens: int) -> list[int]:
        drawn: list[int] = generator.choice(ordinary, num_tokens).tolist()
        return drawn

    return take


def warm_up(engine: Engine, take: TakeTokens) -> None:
    """Run a short request, so that what happens once in a process does not count."""
    engine.generate(take(NUM_WARM_UP_TOKENS), _answer_of(NUM_WARM_UP_TOKENS))


def time_request(engine: Engine, prompt: Sequence[int]) -> tuple[float, Completion]:
    """Seconds from submitting a prompt to its first token, and what came back. The cache is left as it is.

    Raises:
        InvalidRequest: as for `Engine.submit`.
    """
    start = time.perf_counter()
    completion = engine.generate(prompt, _answer_of(1))
    return time.perf_counter() - start, completion


def measure_prefix_hit(
    engine: Engine, take: TakeTokens, *, num_prefix_tokens: int, num_tail_tokens: int, num_hits: int = 3
) -> PrefixHit:
    """Clear the cache, then time a prompt and `num_hits` others that begin with the same `num_prefix_tokens`.

    Raises:
        InvalidRequest: the prompt exceeds the model's limit, the prefix did not come from the cache, or the prompts
            given all begin alike.
    """
    engine.cache.clear()
    prefix = take(num_prefix_tokens)
    cold, *others = _different_tails(take, num_tails=1 + num_hits, num_tokens=num_tail_tokens)
    cold_s, _ = time_request(engine, prefix + cold)
    cached_s: list[float] = []
    for tail in others:
        seconds, completion = time_request(engine, prefix + tail)
        cached_s.append(seconds)
        if completion.usage.exact_tokens != num_prefix_tokens:
            raise InvalidRequest(
                f"{completion.usage.exact_tokens} of {num_prefix_tokens} prefix tokens came from the cache: "
                "the engine's cache is off or its pool holds fewer tokens than the prompts"
            )
    return PrefixHit(cold_s, Samples(tuple(cached_s)).median, num_prefix_tokens)


def _different_tails(take: TakeTokens, *, num_tails: int, num_tokens: int) -> list[list[int]]:
    """Tails that differ in their first token, so that what the cache has ends before them."""
    tails: dict[int, list[int]] = {}
    for _ in range(MAX_DRAWS):
        tail = take(num_tokens)
        tails.setdefault(tail[0], tail)
        if len(tails) == num_tails:
            return list(tails.values())
    raise InvalidRequest(f"{MAX_DRAWS} prompts begin with only {len(tails)} different tokens; {num_tails} are needed")


@contextmanager
def prefilled(
    engine: Engine, take: TakeTokens, *, num_contexts: int, num_tokens: int, num_room_tokens: int
) -> Iterator[list[Context]]:
    """Contexts of `num_tokens` tokens that share nothing, on a cleared cache, released at the end.

    Behind each one lie free pages for `num_room_tokens`, as behind the prompt of a request, which reserves them.

    Raises:
        InvalidRequest: too long for the model.
        PoolExhausted, PoolTooSmall: no pages for them.
    """
    engine.cache.clear()
    with ExitStack() as stack:
        contexts = []
        with ExitStack() as room:
            for _ in range(num_contexts):
                contexts.append(stack.enter_context(engine.context(take(num_tokens))))
                room.enter_context(engine.context(take(num_room_tokens)))
        yield contexts


def time_decode_step(engine: Engine, contexts: Sequence[Context], *, num_new_tokens: int) -> float:
    """Seconds per step in which every context gets one token, over `num_new_tokens - 1` steps.

    Forks generate, so the contexts stay as they are; the cache is cleared, so that it holds no page behind them.
    Seconds per token are this over the number of contexts.

    Raises:
        ValueError: fewer than two tokens, which make no step.
        InvalidRequest: context and answer exceed the model's limit.
    """
    if num_new_tokens < 2:
        raise ValueError(f"a step lies between two tokens; num_new_tokens={num_new_tokens}")
    engine.cache.clear()
    with _forks(contexts) as forks:
        stamps: list[float] = []
        _generate_together(engine, forks, num_new_tokens, stamps)
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def measure_forks(engine: Engine, context: Context, *, num_forks: int) -> ForkCost:
    """Fork a context again and again; every fork is released before the next one."""
    copied_before = engine.cache.stats().bytes_copied
    seconds: list[float] = []
    for _ in range(num_forks):
        start = time.perf_counter()
        fork = context.fork()
        seconds.append(time.perf_counter() - start)
        fork.release()
    return ForkCost(Samples(tuple(seconds)), engine.cache.stats().bytes_copied - copied_before)


def measure_branches(engine: Engine, prompt: Sequence[int], *, num_branches: int, num_new_tokens: int) -> BranchCost:
    """Compute a parent on a cleared cache, fork it, and generate greedily on all branches at once.

    Raises:
        InvalidRequest: too long for the model.
        PoolExhausted, PoolTooSmall: no pages for them.
    """
    engine.cache.clear()
    before = engine.cache.stats()
    start = time.perf_counter()
    with engine.context(prompt) as parent:
        prefilled_at = time.perf_counter()
        with _forks([parent] * num_branches) as branches:
            answers = _generate_together(engine, branches, num_new_tokens)
            end = time.perf_counter()
            pages_used = before.num_free - engine.cache.stats().num_free
    page_size = engine.config.page_size
    pages_expected = -(-len(prompt) // page_size) + num_branches * (-(-num_new_tokens // page_size) + 1)
    return BranchCost(
        prefill_s=prefilled_at - start,
        decode_s=end - prefilled_at,
        pool_bytes=pages_used * before.page_bytes,
        expected_bytes=pages_expected * before.page_bytes,
        answers=answers,
    )


def measure_restore(engine: Engine, prompt: Sequence[int], folder: str | Path) -> RestoreCost:
    """Compute a context on a cleared cache, save it in `folder`, and restore it on a cleared cache.

    Raises:
        SnapshotError: `folder` cannot be written.
        InvalidRequest: too long for the model.
    """
    file = Path(folder) / "benchmark.safetensors"
    engine.cache.clear()
    start = time.perf_counter()
    with engine.context(prompt) as context:
        recompute_s = time.perf_counter() - start
        context.save(file)
    engine.cache.clear()
    start = time.perf_counter()
    with engine.restore(file):
        restore_s = time.perf_counter() - start
    return RestoreCost(recompute_s, restore_s, file.stat().st_size)


@contextmanager
def _forks(contexts: Sequence[Context]) -> Iterator[list[Context]]:
    with ExitStack() as stack:
        yield [stack.enter_context(context.fork()) for context in contexts]


def _generate_together(
    engine: Engine, contexts: Sequence[Context], num_new_tokens: int, stamps: list[float] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Answers of all contexts; `stamps` gets the time of each token of the first one."""
    sampling = _answer_of(num_new_tokens)
    with engine.held():  # no step starts before all are in
        handles = [context.submit(sampling) for context in contexts]
    for _ in handles[0]:
        if stamps is not None:
            stamps.append(time.perf_counter())
    return tuple(handle.result().token_ids for handle in handles)


def _answer_of(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
