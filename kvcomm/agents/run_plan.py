"""What a run of a group needs, and what it makes of that: prompts, sampling, and who fills which slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcomm.agents.agent import Agent
from kvcomm.agents.graph import AgentGraph, Task
from kvcomm.agents.rendering import Filling, PromptRenderer, RenderedPrompt
from kvcomm.agents.results import AgentResult
from kvcomm.agents.templates import Slot
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, PromptTooLong, UnknownAdapter
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine
    from kvcomm.engine.warming import Lessons

NUM_SLOTS_NAMED = 3  # in the error about a prompt that is too long


@dataclass(frozen=True)
class RunPlan:
    """Everything a run needs, checked and tokenized before anything is computed.

    Attributes:
        prompts: agent name -> its rendered prompt.
        inputs: input name -> token ids of its texts.
        num_rounds: rounds to run, at least 1.
        sampling: for agents that bring none of their own.
        lessons: takes what is to be learned from every request, which is served exactly then; None: requests teach as
            the policy says.
        read_along: whether agents that wait read along; not where lessons are taken.
    """

    engine: Engine
    renderer: PromptRenderer
    graph: AgentGraph
    prompts: Mapping[str, RenderedPrompt]
    inputs: Mapping[str, Filling]
    num_rounds: int
    sampling: SamplingParams
    tenant: str
    policy: ReusePolicy
    lessons: Lessons | None = None
    read_along: bool = False

    def check_adapters(self) -> None:
        """Raise UnknownAdapter for an agent whose adapter the engine does not have."""
        wanted = {agent.adapter: agent.name for agent in self.graph.agents if agent.adapter is not None}
        known = self.engine.adapters.names if wanted else ()
        for adapter, name in wanted.items():
            if adapter not in known:
                listed = ", ".join(known) or "none"
                raise UnknownAdapter(f"agent {name!r}: the engine has no adapter {adapter!r}; loaded: {listed}")

    def check_grammars(self) -> None:
        """Raise InvalidRequest for an agent whose answers cannot be held to what it wants."""
        for agent in self.graph.agents:
            grammar = self.sampling_of(agent).grammar
            if grammar is not None:
                try:
                    self.engine.grammars.compile(grammar, owner=self.tenant)
                except InvalidRequest as error:
                    raise InvalidRequest(f"agent {agent.name!r}: {error}") from error

    def check_lengths(self) -> None:
        """Raise PromptTooLong for a prompt that is too long even if every agent it reads says nothing."""
        for agent in self.graph.agents:
            self.prompt_of(agent, Task(agent.name, 1), {})

    def sampling_of(self, agent: Agent) -> SamplingParams:
        """The agent's own sampling, or the group's; with the agent's own grammar."""
        return agent.sampled_by(self.sampling)

    def prompt_of(self, agent: Agent, task: Task, results: Mapping[Task, AgentResult]) -> tuple[Segment, ...]:
        """The agent's prompt from the inputs and the answers there are.

        Raises:
            PromptTooLong: prompt and answer exceed the model's limit; names the agent and the largest slots.
        """
        values = {slot: self._value(slot, task, results) for slot in agent.slots}
        prompt = self.prompts[agent.name].fill(values)
        num_tokens = sum(len(segment.token_ids) for segment in prompt)
        room = self.engine.max_context - self.sampling_of(agent).max_new_tokens
        if num_tokens > room:
            raise PromptTooLong(self._describe_excess(agent, num_tokens, values))
        return prompt

    def answer_of(self, agent: Agent, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What readers get of the ids that an agent's answer ended with."""
        return self.renderer.strip_end(token_ids, self.sampling_of(agent).stop_token_ids)

    def source_of(self, slot: Slot, task: Task) -> Task | None:
        """Whose answer fills a slot; None: an input does, or nothing, since there is no round before."""
        if not slot.previous and slot.name in self.inputs:
            return None
        source = Task(slot.name, task.round - slot.previous)
        return source if source.round else None

    def fill(self, part: Segment | Slot, task: Task, results: Mapping[Task, AgentResult]) -> tuple[Segment, ...]:
        """The segments of one part of a task's prompt, from the inputs and the answers there are."""
        values = {part: self._value(part, task, results)} if isinstance(part, Slot) else {}
        return self.prompts[task.agent].fill_part(part, values)

    def _value(self, slot: Slot, task: Task, results: Mapping[Task, AgentResult]) -> Filling:
        source = self.source_of(slot, task)
        if source is None:
            return () if slot.previous else self.inputs[slot.name]
        return (results[source].token_ids,) if source in results else ()

    def _describe_excess(self, agent: Agent, num_tokens: int, values: Mapping[Slot, Filling]) -> str:
        lengths = {slot: sum(map(len, texts)) for slot, texts in values.items()}
        largest = sorted(lengths.items(), key=lambda item: -item[1])[:NUM_SLOTS_NAMED]
        slots = ", ".join(f"{slot.placeholder} {length}" for slot, length in largest) or "none"
        return (
            f"agent {agent.name!r}: its prompt of {num_tokens} tokens plus "
            f"max_new_tokens={self.sampling_of(agent).max_new_tokens} exceeds the model's "
            f"{self.engine.max_context} tokens; largest slots: {slots}"
        )
