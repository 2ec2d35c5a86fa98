"""Episodes: a sequence of operations on one engine, from an empty pool to an empty pool; and how one is cut down."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eval.engine_faults.faults import Faults
from eval.engine_faults.findings import Finding, Findings
from eval.engine_faults.operations import Operation, draw_engine, draw_operations
from eval.engine_faults.performing import perform
from eval.engine_faults.subject import Subject
from eval.engine_faults.world import World

QUIET_LOGGERS = ("kvcomm", "asyncio")
EPISODE_SEEDS = 1_000_003
"""Seeds of episodes lie so far apart that no run of fewer episodes meets one twice."""


@dataclass(frozen=True)
class Episode:
    """What is done to one engine.

    Attributes:
        engine: settings of the engine.
    """

    engine: Mapping[str, Any]
    operations: Sequence[Operation]

    @classmethod
    def draw(cls, seed: int, index: int, number: int, without: Sequence[str] = ()) -> Episode:
        """The episode of a run; depends on nothing but these numbers."""
        source = random.Random(seed * EPISODE_SEEDS + index)
        return cls(draw_engine(source), draw_operations(source, number, without))

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"engine": dict(self.engine), "operations": [each.to_json() for each in self.operations]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Episode:
        """From a file."""
        return cls(value["engine"], [Operation.from_json(each) for each in value["operations"]])


class Runner:
    """Performs episodes on one subject, under one set of faults."""

    def __init__(self, seed: int, *, with_adapters: bool) -> None:
        self.subject = Subject(seed, with_adapters=with_adapters)
        self.faults = Faults()
        self.faults.watch_model(self.subject.model)

    def run(self, episode: Episode) -> Findings:
        """Perform an episode and give everything back."""
        findings = Findings()
        self.subject.reset()
        with quiet(), self.faults.installed(), TemporaryDirectory(prefix="kvcomm-faults-") as folder:
            world = World(self.subject, episode.engine, self.faults, findings, Path(folder))
            with world.patience.watching():
                self._perform(world, episode.operations)
        self.faults.forget()
        return findings

    def _perform(self, world: World, operations: Sequence[Operation]) -> None:
        for operation in operations:
            perform(world, operation)
            if world.is_lost:
                world.replace()
        world.end()

    def shrink(self, episode: Episode, finding: Finding, max_runs: int) -> Episode:
        """A shorter episode in which the same kind is found, by cutting pieces out as long as that goes on."""

        def still_finds(operations: Sequence[Operation]) -> bool:
            found = self.run(Episode(episode.engine, operations)).all
            return any((each.harm, each.what) == (finding.harm, finding.what) for each in found)

        return Episode(episode.engine, cut(list(episode.operations), still_finds, max_runs))


def cut(
    operations: list[Operation], still_finds: Callable[[Sequence[Operation]], bool], max_runs: int
) -> list[Operation]:
    """Leave out halves, quarters and so on, as long as something is still found."""
    size = len(operations) // 2
    while size and max_runs:
        at = 0
        while at < len(operations) and max_runs:
            fewer = operations[:at] + operations[at + size :]
            max_runs -= 1
            if fewer and still_finds(fewer):
                operations = fewer
            else:
                at += size
        size //= 2
    return operations


@contextmanager
def quiet() -> Iterator[None]:
    """What an engine logs of faults is expected here."""
    loggers = [logging.getLogger(name) for name in QUIET_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
