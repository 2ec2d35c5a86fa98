"""What reuse is worth to a team: the same runs without a cache, with exact prefixes, read along, and on moved KV.

The first three are exact and see the same prompts. Answers given on moved KV, healed or not, may differ, and later
agents read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from kvcomm.agents.example_runs import limited
from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.agents.results import GroupResult
from kvcomm.agents.team import Team
from kvcomm.engine.results import Usage
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine

UNLIKE = "Ready?"
"""What is asked before anything is timed."""


class Way(StrEnum):
    """How a run reuses KV."""

    DENSE = "no cache"
    EXACT = "exact prefixes"
    ALONG = "read along"
    MOVED = "moved KV"
    HEALED = "moved + heal"


Results = Mapping[Way, GroupResult]
"""One run of a team in every way."""

GroupRunner = Callable[[KVCommAgentGroup, Mapping[str, str], int, Way], GroupResult]
"""Runs a group on the inputs of run number N, from 0 on, in a way."""


@dataclass
class AgentReuse:
    """One agent over all runs compared; lists hold one entry per run.

    Attributes:
        usages: of the runs with moved KV.
        dense_s, exact_s, along_s, healed_s: seconds to the first token without a cache, with exact prefixes only, read
            along, and on moved KV that is healed.
        read: prompt tokens that were read along.
        healed: of answers given on moved KV that was healed, the tokens after which all of it was exact.
        audited: nats; divergence of approximated answers from what was computed exactly afterwards.
    """

    agent: str
    usages: list[Usage] = field(default_factory=list)
    dense_s: list[float] = field(default_factory=list)
    exact_s: list[float] = field(default_factory=list)
    along_s: list[float] = field(default_factory=list)
    healed_s: list[float] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    healed: list[int] = field(default_factory=list)
    audited: list[float] = field(default_factory=list)

    @property
    def kvcomm_s(self) -> list[float]:
        """Seconds to the first token with moved KV."""
        return [usage.ttft_s for usage in self.usages]

    @property
    def ways_s(self) -> tuple[list[float], ...]:
        """Seconds to the first token in every way."""
        return self.dense_s, self.exact_s, self.along_s, self.kvcomm_s, self.healed_s

    @property
    def rungs(self) -> list[float]:
        """Shares of the moved tokens that were recomputed at most, of approximated requests."""
        return [usage.approximation.share for usage in self.usages if usage.approximation is not None]

    @property
    def predicted(self) -> list[float]:
        """Nats expected at most, of approximated requests."""
        return [usage.approximation.predicted for usage in self.usages if usage.approximation is not None]

    @property
    def reasons(self) -> Counter[str]:
        """Computed tokens by reason, over all runs."""
        return sum((Counter(dict(usage.reasons)) for usage in self.usages), Counter())

    def mean(self, count: Callable[[Usage], int]) -> float:
        """Mean of a count over runs."""
        return sum(map(count, self.usages)) / len(self.usages)


class Comparison:
    """Collects the same runs in every way, and the audits of what was approximated.

    Attributes:
        agents: in the team's order.
    """

    def __init__(self, engine: Engine, team: Team) -> None:
        """Make one.

        Args:
            engine: on which KV is moved.
        """
        self._engine = engine
        self._agents = {agent.name: AgentReuse(agent.name) for agent in team.agents}
        self._num_audited = self._count_audits()

    @property
    def agents(self) -> list[AgentReuse]:
        """What was collected so far."""
        return list(self._agents.values())

    def add(self, results: Results) -> None:
        """Add one run of the whole team in every way; waits for the audits of the last one."""
        self._engine.wait_idle()
        for name, agent in self._agents.items():
            usage = results[Way.MOVED][name].usage
            agent.usages.append(usage)
            agent.dense_s.append(results[Way.DENSE][name].usage.ttft_s)
            agent.exact_s.append(results[Way.EXACT][name].usage.ttft_s)
            agent.along_s.append(results[Way.ALONG][name].usage.ttft_s)
            agent.read.append(results[Way.ALONG][name].usage.read_along_tokens)
            healed = results[Way.HEALED][name].usage
            agent.healed_s.append(healed.ttft_s)
            if healed.healed_after is not None:
                agent.healed.append(healed.healed_after)
            if usage.approximation is not None:
                agent.audited += self._audited_since(usage.approximation.reader)
        self._num_audited = self._count_audits()

    def _count_audits(self) -> dict[str, int]:
        return {standing.reader.digest: standing.num_audited for standing in self._engine.reuse.readers()}

    def _audited_since(self, reader: str) -> list[float]:
        (standing,) = (each for each in self._engine.reuse.readers() if each.reader.digest == reader)
        count = standing.num_audited - self._num_audited.get(reader, 0)
        return [audit.divergence for audit in list(standing.audits)[-count:]] if count else []


def watched(policy: ReusePolicy) -> ReusePolicy:
    """The policy with every approximated answer audited, and nothing learned meanwhile."""
    return replace(policy, audit=1.0, learn=False)


def healing(policy: ReusePolicy) -> ReusePolicy:
    """The policy with moved KV healed; nothing is audited or learned meanwhile."""
    return replace(policy, heal=True, audit=0.0, learn=False)


def compare(
    engine: Engine,
    team: Team,
    inputs: Sequence[Mapping[str, str]],
    policy: ReusePolicy,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[AgentReuse]:
    """Run a team on inputs in every way, one input at a time; all agents, in the team's order.

    Args:
        engine: warmed up for the policy; its cache is emptied first. The other ways have its settings.
        inputs: of one run each, at least one.

    Raises:
        InvalidRequest: there are no inputs.
    """

    def answer(group: KVCommAgentGroup, given: Mapping[str, str], index: int, way: Way) -> GroupResult:
        note(f"run {index + 1} of {len(inputs)}: {way}")
        return group.run(rounds=team.rounds, **given)

    comparison = Comparison(engine, team)
    for results in in_turns(engine, team, inputs, policy, answer):
        comparison.add(results)
    return comparison.agents


def in_turns(
    engine: Engine, team: Team, inputs: Sequence[Mapping[str, str]], policy: ReusePolicy, answer: GroupRunner
) -> Generator[Results, None, None]:
    """Run a team on inputs in every way, one after the other; which one begins changes with every input.

    What happens only once is done before: text has been moved. Every run finds the role prompts in the cache and
    nothing else. Every answer on moved KV that is not healed is audited behind its run, while nothing else goes on.

    Args:
        engine, inputs: as `compare`.
        answer: runs the group; called once for each input and way.

    Raises:
        InvalidRequest: there are no inputs.
    """
    if not inputs:
        raise InvalidRequest("there are no inputs to compare on")
    from kvcomm.engine.engine import Engine

    with ExitStack() as stack:
        dense, exact, along = (
            stack.enter_context(Engine(engine.model, engine.tokenizer, config=config))
            for config in (replace(engine.config, cache=False), engine.config, engine.config)
        )
        groups = {
            Way.DENSE: team.group(dense, policy=ReusePolicy.exact(), read_along=False),
            Way.EXACT: team.group(exact, policy=ReusePolicy.exact(), read_along=False),
            Way.ALONG: team.group(along, policy=ReusePolicy.exact()),
            Way.MOVED: team.group(engine, policy=watched(policy), read_along=False),
            Way.HEALED: team.group(engine, policy=healing(policy), read_along=False),
        }
        engine.cache.clear()
        read_roles(engine, team, inputs[0])
        _move_once(engine, team, inputs[0], policy)
        engine.wait_idle()
        for index, each in enumerate(inputs):
            first = index % len(Way)
            results = {}
            for way in [*Way][first:] + [*Way][:first]:
                groups[way].engine.cache.clear()
                read_roles(groups[way].engine, team, inputs[0])
                groups[way].engine.wait_idle()
                results[way] = answer(groups[way], {**team.inputs, **each}, index, way)
                engine.wait_idle()  # audits: not beside what is timed next
            yield results


def read_roles(engine: Engine, team: Team, inputs: Mapping[str, str]) -> None:
    """Leave the role prompts in the cache, as in a team at work: by one run on other inputs with these names."""
    _run_short(engine, team, dict.fromkeys(inputs, UNLIKE), ReusePolicy.exact())


def _move_once(engine: Engine, team: Team, inputs: Mapping[str, str], policy: ReusePolicy) -> None:
    """Where the policy allows it, move text like that which is asked: the first time, code is compiled or loaded."""
    unlike = {name: " ".join([UNLIKE, *reversed(text.split())]) for name, text in inputs.items()}
    _run_short(engine, team, unlike, replace(policy, audit=0.0, learn=False))


def _run_short(engine: Engine, team: Team, inputs: Mapping[str, str], policy: ReusePolicy) -> None:
    limited(team, 1).group(engine, policy=policy).run(rounds=1, **{**team.inputs, **inputs})
