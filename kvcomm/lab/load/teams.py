"""Teams of agents over HTTP: every agent reads the answers of the stage before it, along with their writing or later.

Read along, an agent's request is sent as soon as the answers that it reads have begun, and names them; the server
reads them while they are written. The other way it is sent when they have ended, with their texts in the same places.
Both ways have prompts and answers of the same lengths, of texts that neither has seen before; they take turns, and what
is told is the one over the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.figures import Figure
from kvcomm.lab.load.client import Client, Sample
from kvcomm.lab.load.summary import median_ms
from kvcomm.lab.load.workloads import WorkloadSizes, random_words

TEAM_NAMES = 10**9
"""Texts of different runs are drawn from different ones of so many seeds."""


class SimulatedAgent(NamedTuple):
    """One request: what stands before the answers that it reads, what behind them, and the tokens of its answer."""

    role: str
    question: str
    max_tokens: int


@dataclass(frozen=True)
class SimulatedTeam:
    """Agents stage by stage; those of a stage all read the answers of the stage before."""

    stages: tuple[tuple[SimulatedAgent, ...], ...]

    @property
    def num_requests(self) -> int:
        """Over all stages."""
        return sum(map(len, self.stages))


class TeamLoadResult(NamedTuple):
    """All teams once, one way."""

    samples: tuple[Sample, ...]
    team_s: tuple[float, ...]
    duration_s: float

    @property
    def output_throughput(self) -> float:
        """Tokens of answers a second."""
        return sum(sample.output_tokens for sample in self.samples) / self.duration_s

    def num_tokens(self, name: str) -> int:
        """A count of the usage, over all requests."""
        return sum(int(sample.usage.get(name, 0)) for sample in self.samples)


def teams(shape: WorkloadSizes) -> Iterator[SimulatedTeam]:
    """A planner, `shape.branches` agents that read its plan, and one that reads all of theirs.

    Raises:
        InvalidRequest: `shape.num_requests` is too few for one team.
    """
    size = 2 + shape.branches
    if shape.num_requests < size:
        raise InvalidRequest(f"{shape.num_requests} requests are too few for one team of {size}")
    draw = random.Random(shape.seed)

    def agent() -> SimulatedAgent:
        role, question = random_words(draw, shape.prefix_len), random_words(draw, shape.input_len)
        return SimulatedAgent(role, question, shape.output_len)

    for _ in range(shape.num_requests // size):
        yield SimulatedTeam(((agent(),), tuple(agent() for _ in range(shape.branches)), (agent(),)))


def measure_along(
    client: Client, shape: WorkloadSizes, *, num_pairs: int, concurrency: int, tell: Callable[[str], None]
) -> list[Figure]:
    """Teams of that shape with reading along and without, in turn, each first every other time.

    Args:
        concurrency: teams at once.

    Raises:
        ServerError: a request failed; the message says how the first one did.
    """
    warm = replace(shape, num_requests=2 + shape.branches, seed=_seed(shape, -1))
    for is_along in (True, False):
        run_teams(client, list(teams(warm)), concurrency=1, is_along=is_along)
    runs: dict[bool, list[TeamLoadResult]] = {True: [], False: []}
    for pair in range(num_pairs):
        for turn, is_along in enumerate((True, False) if pair % 2 else (False, True)):
            tell(f"pair {pair + 1} of {num_pairs}, {'reading along' if is_along else 'waiting'}")
            texts = replace(shape, seed=_seed(shape, 2 * pair + turn))
            runs[is_along].append(run_teams(client, list(teams(texts)), concurrency=concurrency, is_along=is_along))
    return _figures(runs[True], runs[False])


def run_teams(client: Client, members: Sequence[SimulatedTeam], *, concurrency: int, is_along: bool) -> TeamLoadResult:
    """Send the requests of all teams, of `concurrency` of them at once; raises as `measure_along`."""
    widest = max(sum(map(len, team.stages)) for team in members)
    with ThreadPoolExecutor(concurrency * widest) as threads:
        return asyncio.run(_Run(client, threads, concurrency, is_along).all(members))


@dataclass(eq=False)
class _Speaking:
    """An answer that is asked for: its id once it has begun, then all of it."""

    name: str
    begun: asyncio.Future[str] = field(default_factory=asyncio.Future)
    ended: asyncio.Future[Sample] = field(default_factory=asyncio.Future)


class _Run:
    def __init__(self, client: Client, threads: ThreadPoolExecutor, concurrency: int, is_along: bool) -> None:
        self._client = client
        self._threads = threads
        self._concurrency = concurrency
        self._is_along = is_along
        self._samples: list[Sample] = []
        self._team_s: list[float] = []

    async def all(self, members: Sequence[SimulatedTeam]) -> TeamLoadResult:
        places = asyncio.Semaphore(self._concurrency)
        start_s = time.perf_counter()
        await asyncio.gather(*(self._team(team, places) for team in members))
        return TeamLoadResult(tuple(self._samples), tuple(self._team_s), time.perf_counter() - start_s)

    async def _team(self, team: SimulatedTeam, places: asyncio.Semaphore) -> None:
        async with places:
            start_s = time.perf_counter()
            asked: list[asyncio.Task[None]] = []
            before: list[_Speaking] = []
            for stage in team.stages:
                segments = [await self._read(each) for each in before]
                before = [_Speaking(f"answer {index}") for index in range(len(stage))]
                asked += [
                    asyncio.ensure_future(self._ask(agent, segments, speaking))
                    for agent, speaking in zip(stage, before, strict=True)
                ]
            await asyncio.gather(*asked)
            self._team_s.append(time.perf_counter() - start_s)

    async def _read(self, source: _Speaking) -> Mapping[str, Any]:
        """An answer as a segment of those who read it."""
        if self._is_along:
            return {"id": source.name, "response_id": await source.begun}
        return {"id": source.name, "content": (await source.ended).text or " ", "kind": "dynamic"}

    async def _ask(self, agent: SimulatedAgent, read: Sequence[Mapping[str, Any]], speaking: _Speaking) -> None:
        loop = asyncio.get_running_loop()

        def begun(response_id: str) -> None:
            loop.call_soon_threadsafe(speaking.begun.set_result, response_id)

        def ask() -> Sample:
            segments = [{"id": "role", "content": agent.role}, *read]
            messages = [{"role": "user", "content": agent.question}]
            return self._client.send(messages, agent.max_tokens, begun=begun, segments=segments, ignore_eos=True)

        sample = await loop.run_in_executor(self._threads, ask)
        self._samples.append(sample)
        if sample.error is not None:
            error = ServerError(f"an agent's request failed: {sample.error}")
            for future in (speaking.begun, speaking.ended):
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # nobody may be there to read it
            raise error
        speaking.ended.set_result(sample)


def _seed(shape: WorkloadSizes, run: int) -> int:
    return random.Random(f"{shape.seed}/{run}").randrange(TEAM_NAMES)


def _figures(along: Sequence[TeamLoadResult], waiting: Sequence[TeamLoadResult]) -> list[Figure]:
    ratios = [ours.output_throughput / theirs.output_throughput for ours, theirs in zip(along, waiting, strict=True)]
    team_ratios = [
        np.median(theirs.team_s) / np.median(ours.team_s) for ours, theirs in zip(along, waiting, strict=True)
    ]
    num_read = sum(run.num_tokens("read_along_tokens") for run in along)
    num_computed = sum(run.num_tokens("computed_tokens") for run in along)
    return [
        _median("along_load_cost", ratios, "x"),
        _median("along_team_speedup", [float(ratio) for ratio in team_ratios], "x"),
        _median("output_throughput_along", [run.output_throughput for run in along], "tokens/s"),
        _median("output_throughput_waiting", [run.output_throughput for run in waiting], "tokens/s"),
        median_ms("team_along_ms", [seconds for run in along for seconds in run.team_s]),
        median_ms("team_waiting_ms", [seconds for run in waiting for seconds in run.team_s]),
        Figure("read_along_share", num_read / max(1, num_computed), "of computed prompt tokens"),
        Figure("requests", sum(len(run.samples) for run in (*along, *waiting)), "requests"),
    ]


def _median(name: str, values: Sequence[float], unit: str) -> Figure:
    """The middle one, and the least and the most."""
    return Figure(name, float(np.median(values)), unit, (min(values), max(values)))
