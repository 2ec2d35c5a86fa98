"""Whether the bound survives traffic that changes: readers, levels and watches as they serve, prompts made up.

    python -m eval.bound_simulation [--requests N] [--runs N] [--delta D] [--seed S] [--json]

A prompt is what three rungs would give on it, in nats. It is served as an engine would: by the level and the rung that
`ReaderBook` names, exactly where there is none. Some exact prompts are measured and some accepted ones audited, of
which the book hears a few requests later; both give pairs. Beside it `fixed`: the same pairs, and always the caller's
own delta. Every kind of traffic is told by the share of violations among the accepted requests of a stretch (the fifth
before the middle, where traffic shifts, the fifth behind it, the last fifth, all), by that among all requests, and by
the share accepted. Needs no model.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from eval.figures import PIPE_WIDTH, Figure, Report
from kvcomm.lab.bounds import Audit, Bound, Grounds, Measured, Pair, ReaderBook, violation_limit
from kvcomm.lab.moving import TURNED, Reader

EPSILON = 0.05
BOLDER = np.array([1.0, 1.7, 3.0])
"""What the rungs give, as multiples of the safest one's."""
MEDIAN = 0.0052
"""Nats of the safest rung; the boldest one is within epsilon for nine of ten prompts then."""
PROMPT_SPREAD, RUNG_SPREAD = 0.8, 0.4
"""Standard deviations of the logarithm: of a prompt, and of a rung on it."""
SHIFT = 3.0
TENANT = "tenant"
NUM_PRIOR = 120
PRIOR_SCALE = {"many_readers": 1.0}
"""Traffic for which pairs ship with the model, and how much larger their divergences are than the usual ones."""
AUDITS = {"all": (1.0, 0), "few": (0.02, 20)}
"""Share of accepted requests that are audited, and requests until that is heard of."""

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


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
    """

    bound: Bound
    watched: bool = True
    audit: float = 1.0
    delay: int = 0
    learn: float = 0.5


class Decision(NamedTuple):
    """On what a request is served, and at which rung of the ladder; None: exactly."""

    grounds: Grounds | None
    rung_index: int | None


class Served(NamedTuple):
    """What came of a row of requests, [num_requests] each."""

    accepted: BoolArray
    violated: BoolArray


class Server:
    """Serves prompts by a book, and tells it what becomes known."""

    def __init__(self, serving: Serving, generator: np.random.Generator, prior: Iterable[Pair] = ()) -> None:
        self.book = ReaderBook(prior)
        self.book.admit_prior(TENANT)
        self._serving = serving
        self._generator = generator
        self._unheard: deque[tuple[int, Reader, Audit, Pair]] = deque()
        self._num_served = 0

    def decide(self, reader: Reader) -> Decision:
        """How a request of a reader is served; what has been audited until now counts."""
        while self._unheard and self._unheard[0][0] <= self._num_served:
            _, whose, audit, pair = self._unheard.popleft()
            if self._serving.watched:
                self.book.audited(TENANT, whose, audit)
            self.book.add(TENANT, whose, pair)
        bound = self._serving.bound
        grounds = self.book.grounds(TENANT, reader, (TURNED,), bound)
        if grounds is None:
            return Decision(None, None)
        return Decision(grounds, grounds.rung_index if self._serving.watched else grounds.calibration.choose(*bound))

    def settle(self, reader: Reader, decision: Decision, divergences: FloatArray) -> None:
        """The request has been served.

        Args:
            divergences: [num_rungs], nats.
        """
        self._num_served += 1
        serving, grounds, index = self._serving, decision.grounds, decision.rung_index
        if grounds is not None and index is not None:
            standing = self.book.standing(TENANT, reader)
            standing.num_approximated += 1
            if standing.is_young or self._generator.random() < serving.audit:
                audit = Audit(0.0, float(divergences[index]), EPSILON, serving.bound, grounds.level)
                self._unheard.append((self._num_served + serving.delay, reader, audit, pair_of(divergences)))
        elif self._generator.random() < serving.learn:
            if grounds is not None and grounds.tried is not None and serving.watched:
                grounds.watch.would_give(float(divergences[grounds.tried]))
            self.book.add(TENANT, reader, pair_of(divergences))


def simulate(name: str, serving: Serving, count: int, seed: int) -> Served:
    """`count` requests of one kind of traffic (`TRAFFIC` or `ADVERSARY`), one after the other."""
    generator = np.random.default_rng(seed)
    scales = [PRIOR_SCALE[name]] * NUM_PRIOR if name in PRIOR_SCALE else []
    prior = [pair_of(nats(generator, scale)) for scale in scales]
    server = Server(serving, generator, prior)
    served = Served(np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_))
    for step in range(count):
        prompt = stationary(generator, step, count) if name == ADVERSARY else TRAFFIC[name](generator, step, count)
        reader = Reader(f"{prompt.reader:064x}")
        decision = server.decide(reader)
        divergences = spiteful(decision.rung_index) if name == ADVERSARY else nats(generator, prompt.scale)
        server.settle(reader, decision, divergences)
        if decision.rung_index is not None:
            served.accepted[step], served.violated[step] = True, divergences[decision.rung_index] > EPSILON
    return served


def nats(generator: np.random.Generator, scale: float) -> FloatArray:
    """What the rungs give on a prompt drawn at random, the safest first."""
    of_prompt = scale * MEDIAN * generator.lognormal(0, PROMPT_SPREAD)
    return np.asarray(of_prompt * BOLDER * generator.lognormal(0, RUNG_SPREAD, len(BOLDER)))


def spiteful(rung_index: int | None) -> FloatArray:
    """What the rungs give where the boldest breaks the bound just when it is served."""
    boldest = len(BOLDER) - 1
    return np.where(np.arange(len(BOLDER)) == boldest, 2.0 if rung_index == boldest else 0.5, 0.1) * EPSILON


def pair_of(divergences: FloatArray) -> Pair:
    """What an exact prompt shows."""
    return Pair({rung: Measured(float(value)) for rung, value in zip(TURNED, divergences, strict=True)})


def figures_of(name: str, runs: Sequence[Served], delta: float) -> list[Figure]:
    """Of some runs of one kind of traffic, served in one way."""
    accepted, violated = (np.stack(each) for each in zip(*runs, strict=True))  # [num_runs, num_requests]
    count = accepted.shape[1]
    middle, fifth = count // 2, count // 5
    stretches = {
        "before": slice(middle - fifth, middle),
        "behind": slice(middle, middle + fifth),
        "end": slice(count - fifth, count),
        "all": slice(count),
    }
    found = []
    for stretch, part in stretches.items():
        number = int(accepted[:, part].sum())
        share = float(violated[:, part].sum() / max(1, number))
        goal = f"<= {violation_limit(delta, number):.3f}"
        found.append(Figure(f"{name}_violations_{stretch}", share, "share of accepted", goal=goal))
        found.append(Figure(f"{name}_accepted_{stretch}", float(accepted[:, part].mean()), "share"))
    of_all = float(violated.mean())
    return [
        *found,
        Figure(f"{name}_violations_of_all", of_all, "share", goal=f"<= {violation_limit(delta, count):.3f}"),
    ]


def measure(options: Namespace) -> Report:
    """All kinds of traffic, served in all ways."""
    bound = Bound(EPSILON, options.delta)
    figures = []
    for name in (*TRAFFIC, ADVERSARY):
        for audited, (audit, delay) in AUDITS.items():
            for way, watched in (("fixed", False), ("watched", True)):
                serving = Serving(bound, watched, audit, delay)
                seeds = range(options.seed, options.seed + options.runs)
                runs = [simulate(name, serving, options.requests, seed) for seed in seeds]
                figures += figures_of(f"{name}_{audited}_{way}", runs, options.delta)
    return Report("bound_simulation", figures, vars(options))


def table(report: Report) -> Table:
    """For people: a line for each kind of traffic and way to serve it; violations among accepted / share accepted."""
    values = {figure.id: figure.value for figure in report.figures}
    stretches = ("before", "behind", "end", "all")
    view = Table(title="violations among accepted / accepted", title_justify="left", box=None, pad_edge=False)
    for column in ("traffic", *stretches, "violations of all requests"):
        view.add_column(column)
    for name in [figure.removesuffix("_violations_all") for figure in values if figure.endswith("_violations_all")]:
        shares = [
            f"{values[f'{name}_violations_{part}']:.3f} / {values[f'{name}_accepted_{part}']:.2f}" for part in stretches
        ]
        view.add_row(name.replace("_", " "), *shares, f"{values[f'{name}_violations_of_all']:.3f}")
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print; returns the exit code."""
    parser = ArgumentParser(prog="python -m eval.bound_simulation", description="The bound while traffic changes.")
    parser.add_argument("--requests", type=int, default=1000, help="of a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=8, help="of each kind of traffic (default: %(default)s)")
    parser.add_argument("--delta", type=float, default=0.1, help="of the bound (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    if options.requests < 10 or options.runs < 1:
        parser.error("it takes at least 10 requests and 1 run")
    if not 0 < options.delta < 1:
        parser.error(f"--delta must be between 0 and 1 exclusive, got {options.delta}")
    report = measure(options)
    if options.json:
        report.emit(as_json=True)
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
