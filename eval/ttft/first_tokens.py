"""First tokens of every agent of a team in four ways, on the same prompts and in one process.

`dense`: transformers' own forward over the whole prompt. `exact`: kvcomm with exact reuse only; its role is all that a
prompt shares with earlier ones. `kvcomm`: everything but roles and glue moved, corrected by banks that were taught
before, with no bound (`MOVED`), so that shapes need no calibration: these are times and say nothing of divergences;
`--setting paper` and `eval.fidelity` measure those. `along`: nothing is moved, agents have read along, all but what
followers of decoded outputs lack at the end (`eval.ttft.along`, measured once); on an engine of its own, which knows
the roles only. The engine is timed as its callers see it, from submission to the
first token. Dense goes first in every other case. The exact request comes after the moved one, since it leaves in the
cache what the next agents move; nothing of a moved prompt enters the cache but its role, which was there before. The
first agent has nothing to move and nobody to wait for, so that all of its requests are exact, each with nothing but the
role cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from eval.command import note
from eval.stock import Stock
from eval.ttft.along import follow, num_left, read_along
from eval.ttft.grid import Row
from eval.ttft.team import ONE_TOKEN, Sizes, Team, Texts, num_slot_tokens, tokens_of
from kvcomm import Engine, ReusePolicy, Rung, Segment
from kvcomm.lab.timings import Samples, TakeTokens

WAYS = ("dense", "exact", "kvcomm", "along")
COLUMNS = ("agent", "prompt tokens", *(f"{way} s" for way in WAYS), *(f"dense/{way}" for way in WAYS[1:]))
"""Of the rows that `FirstTokens.rows` gives."""

MOVED = Rung("token")

NUM_FOLLOWED = 64
"""Tokens of the output by which it is measured what a follower lacks."""


@dataclass
class FirstTokens:
    """What was measured: one entry per agent, in each of them one per round.

    Attributes:
        num_tokens: of each agent's prompt.
        seconds: by way.
        aligned: share of what could be moved that was, of agents with something to move.
    """

    num_tokens: list[int] = field(default_factory=list)
    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: {way: [] for way in WAYS})
    aligned: list[float] = field(default_factory=list)

    def samples(self, way: str, agent: int) -> Samples:
        """Seconds of one agent over the rounds."""
        return Samples(tuple(self.seconds[way][agent]))

    def sums(self, way: str, num_agents: int | None = None) -> Samples:
        """Seconds of the first so many agents together, or of all, over the rounds."""
        return Samples(tuple(np.sum(self.seconds[way][:num_agents], axis=0).tolist()))

    def rows(self) -> list[Row]:
        """Medians of every agent and of all together."""
        every = [(f"{agent + 1}", count) for agent, count in enumerate(self.num_tokens)]
        found = [
            _row(name, count, *(self.samples(way, agent) for way in WAYS)) for agent, (name, count) in enumerate(every)
        ]
        return [*found, _row("all", sum(self.num_tokens), *(self.sums(way) for way in WAYS))]

    def raw(self, prefix: str = "") -> dict[str, list[float]]:
        """Every measurement by name."""
        return {
            f"{prefix}{way}_{agent + 1}_s": values for way in WAYS for agent, values in enumerate(self.seconds[way])
        }


@dataclass(frozen=True)
class Servers:
    """Who serves beside a team's engine.

    Attributes:
        along: the engine on which agents read along.
        num_left: tokens of a prompt that was read along which are computed when it is complete.
    """

    stock: Stock
    along: Engine
    num_left: int


@contextmanager
def servers(engine: Engine, take: TakeTokens, sizes: Sizes) -> Iterator[Servers]:
    """For teams on an engine; what followers lack is measured on one of these sizes."""
    with Engine(engine.model, engine.tokenizer, config=engine.config) as along:
        reader = follow(Team(along, take, sizes._replace(agents=2)), min(NUM_FOLLOWED, sizes.output))
        yield Servers(Stock(engine.model), along, num_left(reader.usage))


def measure_first_tokens(team: Team, servers: Servers, *, num_rounds: int) -> FirstTokens:
    """Measure a team whose banks have been taught, on new texts in every round."""
    found = FirstTokens()
    for index in range(num_rounds):
        note(f"  round {index + 1} of {num_rounds}")
        _round(team, servers, found, is_odd=bool(index % 2))
    return found


def warm_up(team: Team, servers: Servers) -> None:
    """Let the first two agents have one round that does not count."""
    team.restart()
    texts, scrap = team.texts(), FirstTokens()
    for agent in team.agents[:2]:
        _agent(team, servers, texts, agent, scrap, dense_first=False)


def _round(team: Team, servers: Servers, found: FirstTokens, *, is_odd: bool) -> None:
    team.restart()
    texts = team.texts()
    for agent in team.agents:
        _agent(team, servers, texts, agent, found, dense_first=bool(agent % 2) != is_odd)
        note(f"    agent {agent + 1} of {len(team.agents)}, {found.num_tokens[agent]} tokens")


def _agent(team: Team, servers: Servers, texts: Texts, agent: int, found: FirstTokens, *, dense_first: bool) -> None:
    """Measure an agent and leave what the next ones read."""
    prompt, exact = team.prompt(agent, texts), ReusePolicy.exact()
    tokens = tokens_of(prompt)
    team.read_role(agent)
    seconds = {}
    if dense_first:
        seconds["dense"] = servers.stock.prefill_s(tokens, use_cache=True)
    moved = team.engine.generate(prompt, ONE_TOKEN, policy=exact, rung=MOVED).usage
    seconds["kvcomm"] = moved.ttft_s
    if not agent:
        team.restart()  # nothing was moved, so the prompt is cached now
    seconds["exact"] = team.engine.generate(prompt, ONE_TOKEN, policy=exact).usage.ttft_s
    seconds["along"] = _along_s(servers, prompt, reads=bool(agent))
    if not dense_first:
        seconds["dense"] = servers.stock.prefill_s(tokens, use_cache=True)
    team.publish(agent, texts)
    if agent:
        found.aligned.append(moved.aligned_tokens / num_slot_tokens(prompt))
    if agent == len(found.num_tokens):
        found.num_tokens.append(len(tokens))
        for way in WAYS:
            found.seconds[way].append([])
    for way in WAYS:
        found.seconds[way][agent].append(seconds[way])


def _along_s(servers: Servers, prompt: Sequence[Segment], *, reads: bool) -> float:
    """Seconds to the first token of an agent that reads along if it reads others at all."""
    engine, exact = servers.along, ReusePolicy.exact()
    engine.cache.clear()
    engine.context(prompt[:1], policy=exact).release()
    if not reads:
        return engine.generate(prompt, ONE_TOKEN, policy=exact).usage.ttft_s
    return read_along(engine, prompt, servers.num_left).usage.ttft_s


def _row(name: str, num_tokens: int, *ways: Samples) -> Row:
    dense, *others = ways
    return (name, num_tokens, *(way.median for way in ways), *(dense.per(way).median for way in others))
