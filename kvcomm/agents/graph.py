"""Who reads whom: the dependency graph that a group's placeholders describe.

A slot whose name is an agent's is an edge, any other name is an input of the run. Only slots of the same
round can form a cycle; `{x@previous}` reads a finished round. A graph is immutable and knows neither tokens
nor the engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from kvcomm.agents.agent import Agent
from kvcomm.agents.templates import Slot
from kvcomm.errors import TemplateError
from kvcomm.memory.segments import Segment

RESERVED_INPUTS = frozenset({"rounds"})


class Task(NamedTuple):
    """One agent answering in one round, counted from 1."""

    agent: str
    round: int


@dataclass(frozen=True)
class AgentGraph:
    """The agents of a group in the order they were added.

    Raises:
        TemplateError: two agents share a name, or agents read each other in a circle within one round.
    """

    agents: tuple[Agent, ...]

    def __post_init__(self) -> None:
        names = [agent.name for agent in self.agents]
        for name in names:
            if names.count(name) > 1:
                raise TemplateError(f"agent {name!r} is in the group already; agent names must be unique")
        self._check_cycles()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all agents."""
        return tuple(agent.name for agent in self.agents)

    def agent(self, name: str) -> Agent:
        """The agent with a name, which is in the group."""
        return self._by_name[name]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that a run has to be given, in order of first use."""
        slots = [slot for agent in self.agents for slot in agent.slots]
        return tuple(dict.fromkeys(slot.name for slot in slots if slot.name not in self.names))

    @property
    def final(self) -> tuple[str, ...]:
        """Agents that no agent of the same round reads."""
        read = {name for agent in self.agents for name in self._sources(agent)}
        return tuple(name for name in self.names if name not in read)

    def needs(self, task: Task) -> frozenset[Task]:
        """Tasks to finish before this one starts: what it reads, and the agent's own last answer."""
        agent = self.agent(task.agent)
        needed = {Task(name, task.round) for name in self._sources(agent)}
        if task.round > 1:
            earlier = [slot.name for slot in agent.slots if slot.previous] + [agent.name]
            needed |= {Task(name, task.round - 1) for name in earlier}
        return frozenset(needed)

    def check_inputs(self, inputs: Mapping[str, object]) -> None:
        """Check that a run's inputs are exactly what the placeholders ask for.

        Raises:
            TemplateError: no agents, an input named like an agent, a placeholder without a value, an input
                nobody reads, or a value that is neither text nor passages. Names the agent and the placeholder.
        """
        if not self.agents:
            raise TemplateError("the group has no agents; add one with group.add(Agent(...))")
        self._check_clashes(inputs)
        for agent in self.agents:
            for slot in agent.slots:
                self._check_slot(agent, slot, inputs)
        for name, value in inputs.items():
            self._check_value(name, value)

    @cached_property
    def _by_name(self) -> dict[str, Agent]:
        return {agent.name: agent for agent in self.agents}

    def _sources(self, agent: Agent) -> tuple[str, ...]:
        return tuple(slot.name for slot in agent.slots if not slot.previous and slot.name in self.names)

    def _check_cycles(self) -> None:
        try:
            TopologicalSorter({agent.name: self._sources(agent) for agent in self.agents}).prepare()
        except CycleError as error:
            path: list[str] = error.args[1]  # each answers the next; first and last are the same
            raise TemplateError(
                f"agent {path[1]!r}, placeholder {{{path[0]}}}: the agents wait for each other: "
                f"{' -> '.join(path)}; to break the cycle read the round before: {{{path[0]}@previous}}"
            ) from None

    def _check_clashes(self, inputs: Mapping[str, object]) -> None:
        for name in inputs:
            if name in self.names:
                raise TemplateError(
                    f"input {name!r} has the name of an agent, so {{{name}}} would be ambiguous; rename one"
                )

    def _check_slot(self, agent: Agent, slot: Slot, inputs: Mapping[str, object]) -> None:
        where = f"agent {agent.name!r}, placeholder {slot.placeholder}"
        if slot.name in self.names or (slot.name in inputs and not slot.previous):
            return
        if slot.previous:
            raise TemplateError(f"{where}: {slot.name!r} is not an agent, so it has no answer of a previous round")
        if slot.name in RESERVED_INPUTS:
            raise TemplateError(f"{where}: {slot.name!r} is a parameter of run() and cannot name an input; rename it")
        hint = _suggest(slot.name, (*self.names, *inputs))
        raise TemplateError(
            f"{where}: neither an agent nor an input of this run{hint}; agents: {_listed(self.names)}; "
            f"inputs: {_listed(inputs)}"
        )

    def _check_value(self, name: str, value: object) -> None:
        if name not in self.inputs:
            raise TemplateError(
                f"input {name!r} is read by no agent{_suggest(name, self.inputs)}; the placeholders ask for: "
                f"{_listed(self.inputs)}"
            )
        if isinstance(value, str | Segment):
            return
        if not isinstance(value, list | tuple):
            raise TemplateError(f"input {name!r} must be text (str) or a list of passages, got {type(value).__name__}")
        for index, item in enumerate(value):
            if not isinstance(item, str | Segment):
                raise TemplateError(
                    f"input {name!r}, passage {index}: must be text (str) or a Segment, got {type(item).__name__}"
                )


def _suggest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed(names: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
