"""What reuse is worth to a team: the same runs without a cache, with exact prefixes, and with moved KV.

The three do not see quite the same prompts: answers given on moved KV may differ, and later agents read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from kvcomm.agents.example_runs import limited
from kvcomm.agents.results import GroupResult
from kvcomm.agents.team import Team
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Usage
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy


@dataclass
class AgentReuse:
    """One agent over all runs compared; lists hold one entry per run.

    Attributes:
        usages: of the runs with moved KV.
        dense_s, exact_s: seconds to the first token without a cache, and with exact prefixes only.
        audited: nats; divergence of approximated answers from what was computed exactly afterwards.
    """

    agent: str
    usages: list[Usage] = field(default_factory=list)
    dense_s: list[float] = field(default_factory=list)
    exact_s: list[float] = field(default_factory=list)
    audited: list[float] = field(default_factory=list)

    @property
    def kvcomm_s(self) -> list[float]:
        """Seconds to the first token with moved KV."""
        return [usage.ttft_s for usage in self.usages]

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
    """Collects the same runs in three ways, and the audits of what was approximated.

    Attributes:
        agents: in the team's order.
    """

    def __init__(self, engine: Engine, team: Team) -> None:
        """Args:
        engine: on which KV is moved.
        """
        self._engine = engine
        self._agents = {agent.name: AgentReuse(agent.name) for agent in team.agents}
        self._num_audited = self._count_audits()

    @property
    def agents(self) -> list[AgentReuse]:
        """What was collected so far."""
        return list(self._agents.values())

    def add(self, dense: GroupResult, exact: GroupResult, moved: GroupResult) -> None:
        """Add one run of the whole team in the three ways; waits for the audits of the last one."""
        self._engine.wait_idle()
        for name, agent in self._agents.items():
            usage = moved[name].usage
            agent.usages.append(usage)
            agent.dense_s.append(dense[name].usage.ttft_s)
            agent.exact_s.append(exact[name].usage.ttft_s)
            if usage.approximation is not None:
                agent.audited += self._audited_since(usage.approximation.reader)
        self._num_audited = self._count_audits()

    def _count_audits(self) -> dict[str, int]:
        return {standing.reader.digest: standing.num_audited for standing in self._engine.readers()}

    def _audited_since(self, reader: str) -> list[float]:
        (standing,) = (each for each in self._engine.readers() if each.reader.digest == reader)
        count = standing.num_audited - self._num_audited.get(reader, 0)
        return [audit.divergence for audit in list(standing.audits)[-count:]] if count else []


def watched(policy: ReusePolicy) -> ReusePolicy:
    """The policy with every approximated answer audited, and nothing learned meanwhile."""
    return replace(policy, audit=1.0, learn=False)


def compare(
    engine: Engine,
    team: Team,
    inputs: Sequence[Mapping[str, str]],
    policy: ReusePolicy,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[AgentReuse]:
    """Run a team on inputs in the three ways, one input at a time; all agents, in the team's order.

    Args:
        engine: warmed up for the policy; its cache is emptied first. The other two ways have its settings.
        inputs: of one run each, at least one.

    Raises:
        InvalidRequest: there are no inputs.
    """
    if not inputs:
        raise InvalidRequest("there are no inputs to compare on")
    with ExitStack() as stack:
        dense = stack.enter_context(Engine(engine.model, engine.tokenizer, config=replace(engine.config, cache=False)))
        exact = stack.enter_context(Engine(engine.model, engine.tokenizer, config=engine.config))
        ways = {
            "dense": team.group(dense, policy=ReusePolicy.exact()),
            "exact prefixes": team.group(exact, policy=ReusePolicy.exact()),
            "moved KV": team.group(engine, policy=watched(policy)),
        }
        engine.clear_cache()
        for each_engine in (exact, engine):
            read_roles(each_engine, team, inputs[0])
        comparison = Comparison(engine, team)
        for index, each in enumerate(inputs):
            results = []
            for way, group in ways.items():
                note(f"run {index + 1} of {len(inputs)}: {way}")
                results.append(group.run(rounds=team.rounds, **{**team.inputs, **each}))
            note(f"run {index + 1} of {len(inputs)}: audits")
            comparison.add(*results)
    return comparison.agents


def read_roles(engine: Engine, team: Team, inputs: Mapping[str, str]) -> None:
    """Leave the role prompts in the cache, as in a team at work: by one run on other inputs with these names."""
    short = limited(team, 1)
    unlike = dict.fromkeys(inputs, "Ready?")
    short.group(engine, policy=ReusePolicy.exact()).run(rounds=1, **{**team.inputs, **unlike})
