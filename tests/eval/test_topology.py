"""Who reads whom in every topology."""

from __future__ import annotations

import pytest

from eval.tasks.topology import TOPOLOGIES, wire
from kvcomm.agents import load_team
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.team import Team
from kvcomm.errors import InvalidRequest


def reads(team: Team) -> dict[str, set[str]]:
    inputs = set(team.required_inputs)
    return {agent.name: {slot.name for slot in agent.slots} - inputs for agent in team.agents}


def test_who_reads_whom() -> None:
    team = load_team("gsm8k")
    assert reads(wire(team, 3, "full")) == {"solver": set(), "analyst": {"solver"}, "referee": {"solver", "analyst"}}
    assert reads(wire(team, 4, "chain")) == {
        "solver": set(),
        "analyst": {"solver"},
        "programmer": {"analyst"},
        "referee": {"programmer"},
    }
    assert reads(wire(team, 3, "star")) == {"solver": set(), "analyst": set(), "referee": {"solver", "analyst"}}
    assert reads(wire(team, 3, "debate")) == {
        "solver": set(),
        "analyst": set(),
        "solver_again": {"analyst"},
        "analyst_again": {"solver"},
        "referee": {"solver_again", "analyst_again"},
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval"])
def test_every_team_can_be_wired_in_every_way(name: str, topology: str) -> None:
    team = load_team(name)
    for num_agents in range(2, 6):
        wired = wire(team, num_agents, topology)
        assert set(wired.required_inputs) == set(team.required_inputs)
        assert wired.agents[-1].name == "referee"
        assert AgentGraph(wired.agents).agents == wired.agents
        for agent in wired.agents:
            assert agent.prompt.startswith(team.agents[0].prompt.strip())
            assert agent.system == next(each.system for each in team.agents if agent.name.startswith(each.name))


def test_what_cannot_be_wired() -> None:
    with pytest.raises(InvalidRequest, match="unknown topology 'ring'; there are full, chain, debate, star"):
        wire(load_team("gsm8k"), 3, "ring")
    with pytest.raises(InvalidRequest, match="has 5 agents"):
        wire(load_team("gsm8k"), 6, "full")
