"""Who reads whom: the agents of a team, wired in one of four ways, with a referee that answers.

`full`: everybody reads all before; `chain`: everybody reads the one before; `star`: nobody but the referee reads
others; `debate`: as star, then everybody reads the others' first answers and answers anew, and the referee reads those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvcomm.agents import Agent, Team
from kvcomm.errors import InvalidRequest

TOPOLOGIES = ("full", "chain", "debate", "star")
AGENTS = range(2, 6)
AGAIN = "_again"


def wire(team: Team, num_agents: int, topology: str) -> Team:
    """The first workers of a team and its referee, the last agent, in a topology.

    Every prompt begins as that of the first worker, which shows the inputs.

    Raises:
        InvalidRequest: the team has fewer agents, or its first one reads others.
    """
    if not 2 <= num_agents <= len(team.agents):
        raise InvalidRequest(f"team {team.name!r} has {len(team.agents)} agents; --agents is 2 to that")
    head = team.agents[0].prompt.strip()
    if {slot.name for slot in team.agents[0].slots} - set(team.required_inputs):
        raise InvalidRequest(
            f"agent {team.agents[0].name!r} of team {team.name!r} comes first and must read inputs only"
        )
    workers, referee = team.agents[: num_agents - 1], team.agents[-1]
    if topology == "debate":
        wired = _debate(workers, referee, head)
    elif topology in TOPOLOGIES:
        wired = [
            _reading(agent, head, _read_before([*workers, referee], index, topology))
            for index, agent in enumerate([*workers, referee])
        ]
    else:
        raise InvalidRequest(f"unknown topology {topology!r}; there are {', '.join(TOPOLOGIES)}")
    return replace(team, agents=tuple(wired), rounds=1)


def role_of(name: str) -> str:
    """The agent of the team that an agent of a topology plays."""
    return name.removesuffix(AGAIN)


def _read_before(agents: Sequence[Agent], index: int, topology: str) -> list[str]:
    before = [agent.name for agent in agents[:index]]
    if topology == "chain":
        return before[-1:]
    is_referee = index == len(agents) - 1
    return before if topology == "full" or is_referee else []


def _debate(workers: Sequence[Agent], referee: Agent, head: str) -> list[Agent]:
    second = {agent.name: f"{agent.name}{AGAIN}" for agent in workers}
    first = [_reading(agent, head, []) for agent in workers]
    again = [
        replace(
            _reading(agent, head, [other.name for other in workers if other is not agent]),
            name=second[agent.name],
        )
        for agent in workers
    ]
    return [*first, *again, _reading(referee, head, list(second.values()))]


def _reading(agent: Agent, head: str, names: Sequence[str]) -> Agent:
    """The agent with a prompt of the team's inputs, the answers it reads, and what it was told to do with them."""
    parts = [head]
    parts += [f"{name.replace('_', ' ').capitalize()}: {{{name}}}" for name in names]
    closing = agent.prompt.rsplit("}", 1)[-1].strip()
    return replace(agent, prompt="\n\n".join([*parts, closing] if closing else parts))
