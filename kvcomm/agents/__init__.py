"""Agents that share one model's KV cache: groups, templates, teams from files, tree search over contexts."""

from __future__ import annotations

from kvcomm.agents.agent import Agent
from kvcomm.agents.branches import SearchResult, SearchStats
from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.agents.results import (
    AgentFinished,
    AgentResult,
    AgentStarted,
    AgentText,
    GroupEvent,
    GroupFinished,
    GroupResult,
    RoundFinished,
)
from kvcomm.agents.search import beam, best_first, mcts
from kvcomm.agents.team import Team, load_team, packaged_teams
from kvcomm.agents.templates import Slot, parse_template
from kvcomm.agents.thoughts import SampleThoughts, Thought
from kvcomm.engine.chat_template import Static
from kvcomm.errors import AgentFailed

__all__ = [
    "Agent",
    "AgentFailed",
    "AgentFinished",
    "AgentResult",
    "AgentStarted",
    "AgentText",
    "GroupEvent",
    "GroupFinished",
    "GroupResult",
    "KVCommAgentGroup",
    "RoundFinished",
    "SampleThoughts",
    "SearchResult",
    "SearchStats",
    "Slot",
    "Static",
    "Team",
    "Thought",
    "beam",
    "best_first",
    "load_team",
    "mcts",
    "packaged_teams",
    "parse_template",
]
