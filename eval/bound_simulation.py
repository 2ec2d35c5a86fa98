"""Whether the bound survives traffic that changes: readers, levels and watches as they serve, prompts made up.

    python -m eval.bound_simulation [--requests N] [--runs N] [--delta D] [--seed S] [--json]

A prompt is what three rungs would give on it, in nats. It is served as an engine would: by the level and the rung that
`ReaderBook` names, exactly where there is none. Some exact prompts are measured, and some accepted ones audited, of
which the book hears a few requests later; both give pairs. Beside it `fixed`: the same pairs, and the caller's own
delta always. Each kind of traffic is told as the share of violations among the accepted requests of a stretch (before
a shift, right behind it, in the end) and as the share accepted.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eval.figures import Figure, Report
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.intervals import violation_limit
from kvcomm.align.ladder import TURNED
from kvcomm.align.levels import LEVELS, Audit, Level, ReaderBook
from kvcomm.align.readers import Reader

EPSILON = 0.05
BOLDER = np.array([1.0, 1.7, 3.0])
"""What the rungs give, as multiples of the safest one's."""
MEDIAN = 0.0052
"""Nats of the safest rung; the boldest one is within epsilon for nine of ten prompts then."""
PROMPT_SPREAD, RUNG_SPREAD = 0.8, 0.4
"""Standard deviations of the logarithm: of a prompt, and of a rung on it."""
SHIFT = 3.0
TENANT = "tenant"

FloatArray = npt.NDArray[np.float64]


class Prompt(NamedTuple):
    """Who reads, and how much larger its divergences are than the usual ones."""

    reader: int
    scale: float


Traffic = Callable[[np.random.Generator, int, int], Prompt]
"""From the generator, the number of a request and how many there are, the prompt."""


def stationary(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """One reader, always the same."""
    return Prompt(0, 1.0)


def sudden(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """Three times larger from the middle on."""
    return Prompt(0, SHIFT if step >= count // 2 else 1.0)


def drifting(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """Slowly growing to three times as large."""
    return Prompt(0, SHIFT ** (step / count))


def alternating(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """Large and small in turn, for a tenth of all requests each."""
    return Prompt(0, SHIFT if 10 * step // count % 2 else 1.0)


def many_readers(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """Twenty-five requests of each reader; new ones come all the time, and some are harder than others."""
    reader = int(generator.integers(4)) + 4 * (step // 100)
    return Prompt(reader, float(np.exp(np.random.default_rng(reader).normal(0, 0.5))))


def mixed_reader(generator: np.random.Generator, step: int, count: int) -> Prompt:
    """One reader of two kinds of text, and from the middle on more of the harder one."""
    return Prompt(0, SHIFT if generator.random() < (0.5 if step >= count // 2 else 0.1) else 0.7)


TRAFFIC: Mapping[str, Traffic] = {
    each.__name__: each for each in (stationary, sudden, drifting, alternating, many_readers, mixed_reader)
}
ADVERSARY = "adversary"
"""Breaks the bound whenever the boldest rung was accepted, and never else."""


@dataclass(frozen=True)
class Serving:
    """How requests are served.

    Attributes:
        bound: that the caller asks for.
        watched: whether audits move the working delta and breakers; if not, the caller's delta holds always.
        audit: share of accepted requests that are audited, beside those of young readers.
        delay: requests until an audit is heard of.
        learn: share of exact prompts that are measured.
        levels: that the caller accepts.
    """

    bound: Bound
    watched: bool = True
    audit: float = 1.0
    delay: int = 0
    learn: float = 0.5
    levels: tuple[Level, ...] = LEVELS


class Served(NamedTuple):
    """What came of a stretch of requests, one entry each."""

    accepted: npt.NDArray[np.bool_]
    violated: npt.NDArray[np.bool_]


class Server:
    """Serves prompts by a book, and tells it what becomes known."""

    def __init__(self, serving: Serving, generator: np.random.Generator, prior: Sequence[Pair] = ()) -> None:
        self.book = ReaderBook(prior)
        self._serving = serving
        self._generator = generator
        self._heard: deque[tuple[int, Reader, Audit, Pair]] = deque()
        self._num_served = 0

    def serve(self, reader: Reader, prompt: Callable[[int | None], FloatArray]) -> tuple[int | None, FloatArray]:
        """Serve one request.

        Args:
            prompt: from the rung that it is served at to what all rungs give; only an adversary looks.

        Returns:
            The rung, None where it was computed exactly, and what all rungs give.
        """
        self._hear()
        self._num_served += 1
        serving, book = self._serving, self.book
        grounds = book.grounds(TENANT, reader, (TURNED,), serving.bound, serving.levels)
        rung = None
        if grounds is not None:
            rung = grounds.rung if serving.watched else grounds.calibration.choose(*serving.bound)
        divergences = prompt(rung)
        pair = pair_of(divergences)
        standing = book.standing(TENANT, reader)
        if grounds is not None and rung is not None:
            standing.num_approximated += 1
            if standing.is_young or self._generator.random() < serving.audit:
                audit = Audit(0.0, float(divergences[rung]), EPSILON, serving.bound, grounds.level)
                self._heard.append((self._num_served + serving.delay, reader, audit, pair))
        elif self._generator.random() < serving.learn:
            if grounds is not None and serving.watched and grounds.tried is not None:
                grounds.watch.would_give(divergences[grounds.tried])
            book.add(TENANT, reader, pair)
        return rung, divergences

    def _hear(self) -> None:
        while self._heard and self._heard[0][0] <= self._num_served:
            _, reader, audit, pair = self._heard.popleft()
            if self._serving.watched:
                self.book.audited(TENANT, reader, audit)
            self.book.add(TENANT, reader, pair)


def simulate(traffic: str, serving: Serving, count: int, seed: int, prior_scale: float | None = None) -> Served:
    """`count` requests, one after the other.

    Args:
        traffic: its name.
        prior_scale: of the pairs that ship with the model, as of a prompt; None: there are none.
    """
    generator = np.random.default_rng(seed)
    prior = [] if prior_scale is None else [pair_of(nats(generator, prior_scale)) for _ in range(120)]
    server = Server(serving, generator, prior)
    readers: dict[int, Reader] = {}
    accepted, violated = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    for step in range(count):
        if traffic == ADVERSARY:
            number, prompt = 0, _spiteful
        else:
            number, scale = TRAFFIC[traffic](generator, step, count)
            drawn = nats(generator, scale)
            prompt = lambda rung, drawn=drawn: drawn  # noqa: E731
        reader = readers.setdefault(number, Reader(f"{number:064x}"))
        rung, divergences = server.serve(reader, prompt)
        if rung is not None:
            accepted[step], violated[step] = True, divergences[rung] > EPSILON
    return Served(accepted, violated)


def nats(generator: np.random.Generator, scale: float) -> FloatArray:
    """What the rungs give on one prompt, the safest first."""
    of_prompt = scale * MEDIAN * generator.lognormal(0, PROMPT_SPREAD)
    return np.asarray(of_prompt * BOLDER * generator.lognormal(0, RUNG_SPREAD, len(BOLDER)))


def pair_of(divergences: FloatArray) -> Pair:
    """What an exact prompt shows."""
    return Pair({rung: Measured(float(nats)) for rung, nats in zip(TURNED, divergences, strict=True)})


def _spiteful(rung: int | None) -> FloatArray:
    is_boldest = rung == len(BOLDER) - 1
    return np.where(np.arange(len(BOLDER)) == len(BOLDER) - 1, 2.0 if is_boldest else 0.5, 0.1) * EPSILON
