"""A group of agents that share one engine, and so one KV cache.

The group owns the list of agents and what they have in common (tenant, sampling, policy). A run is checked
completely before anything is computed, and leaves nothing in flight however it ends: finished, failed, closed
or interrupted. The order in which agents run follows from their placeholders alone; the group has no
scheduling of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, TypedDict, cast, overload

from kvcomm.agents.agent import Agent, check_one_answer
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.rendering import Input, PromptRenderer
from kvcomm.agents.results import GroupEvent, GroupFinished, GroupResult
from kvcomm.agents.run_plan import RunPlan
from kvcomm.agents.running import follow, follow_async
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest, PromptTooLong, TemplateError
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.values import told as told_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.engine.engine import Engine
    from kvcomm.engine.warming import Gained, Progress
    from kvcomm.reuse.status import ReaderStatus

MAX_SHOWN = 6


class GroupSettings(TypedDict, total=False):
    """What the agents of a group have in common; see `KVCommAgentGroup`."""

    policy: ReusePolicy | None
    sampling: SamplingParams | None
    tenant: str


class KVCommAgentGroup:
    """Agents that answer together, each reading the run's inputs and other agents' answers.

    Args:
        engine_or_model: an Engine (stays the caller's), or a transformers model from which one is made.
        tokenizer: the model's tokenizer; None with an Engine.
        policy: how far reuse may depart from exact answers; None: the engine's.
        sampling: for agents that bring none; None: `SamplingParams()`.
        tenant: whose cache is used.
        read_along: whether agents that wait read what others write while they write it, as far as the answers in
            progress leave time for that. Prompts and answers are the same; first tokens come sooner.

    Raises:
        InvalidRequest: a model without a tokenizer, or an Engine with one.
        TemplateError: sampling with n other than 1.
    """

    def __init__(
        self,
        engine_or_model: Engine | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        policy: ReusePolicy | None = None,
        sampling: SamplingParams | None = None,
        tenant: str = "default",
        read_along: bool = True,
    ) -> None:
        check_one_answer(sampling, owner="the group")
        self._engine, self._owns_engine = _as_engine(engine_or_model, tokenizer, policy)
        self._renderer = PromptRenderer(self._engine)
        self._graph = AgentGraph(())
        self._sampling = sampling or SamplingParams()
        self._tenant = tenant
        self._read_along = read_along
        self.policy = policy or self._engine.policy

    def __repr__(self) -> str:
        names = ", ".join(agent.name for agent in self.agents[:MAX_SHOWN]) or "no agents"
        more = f" and {len(self.agents) - MAX_SHOWN} more" if len(self.agents) > MAX_SHOWN else ""
        bound = self.policy.bound
        reuse = "exact" if bound is None else f"up to {bound.max_divergence:g} nats at {bound.confidence:g}"
        return f"KVCommAgentGroup({names}{more}; {reuse}; {self._engine!r})"

    @property
    def engine(self) -> Engine:
        """The engine all agents share."""
        return self._engine

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The agents in the order they were added."""
        return self._graph.agents

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs a run has to be given."""
        return self._graph.inputs

    def add(self, agent: Agent) -> KVCommAgentGroup:
        """Add an agent and return the group. Agents may be added before those they read.

        Raises:
            TemplateError: the name is taken, or the agent closes a cycle; the group stays as it was.
        """
        self._graph = AgentGraph((*self._graph.agents, agent))
        return self

    def run(self, /, rounds: int = 1, **inputs: Input) -> GroupResult:
        """Let every agent answer once a round and return all answers.

        Agents whose inputs are ready run in one batch. In each round every agent answers anew; what it reads
        as `{x}` is of the same round, `{x@previous}` of the round before.

        Args:
            rounds: at least 1.
            inputs: for every placeholder that is not an agent a text, or a list of passages (texts, or segments of
                `Engine.segment`). Each passage is a segment of its own, named as the placeholder: the same ids in any
                order, so that its KV can be moved. Between two of them stands an empty line.

        Raises:
            TemplateError: placeholders, agents and inputs do not fit together. Nothing has run.
            UnknownAdapter: an agent names an adapter that the engine does not have. Nothing has run.
            PromptTooLong: a prompt exceeds the model's limit; names the agent and its largest slots.
            AgentFailed: an agent could not answer; the others were cancelled.
        """
        with closing(self.stream(rounds, **inputs)) as events:
            for event in events:
                if isinstance(event, GroupFinished):
                    return event.result
        raise AssertionError("a run ended without a result or an error")

    def stream(self, /, rounds: int = 1, **inputs: Input) -> Generator[GroupEvent, None, None]:
        """Run the group and yield what happens as it happens; the last event is GroupFinished.

        Inputs are checked now, the run starts with the first event asked for. Closing the iterator (or an
        exception in the loop over it, with `contextlib.closing`) cancels everything in flight. Raises as
        `run` does.
        """
        return follow(self._plan(rounds, inputs))

    async def arun(self, /, rounds: int = 1, **inputs: Input) -> GroupResult:
        """Like `run`, without blocking the event loop; cancelling the task cancels the run."""
        async with aclosing(self.astream(rounds, **inputs)) as events:
            async for event in events:
                if isinstance(event, GroupFinished):
                    return event.result
        raise AssertionError("a run ended without a result or an error")

    def astream(self, /, rounds: int = 1, **inputs: Input) -> AsyncGenerator[GroupEvent, None]:
        """Like `stream`, as an async generator; `aclose()` cancels everything in flight."""
        return follow_async(self._plan(rounds, inputs))

    def warm(
        self, examples: Iterable[Mapping[str, str]], *, rounds: int = 1, progress: Progress = False
    ) -> dict[str, Gained]:
        """Learn from examples at once what runs like them would teach by and by.

        Every example is run exactly, and every agent's prompt is learned from completely: first measured for all rungs
        of the group's policy, then its anchors are taught. Answers are not kept. Requests of others come first.

        Args:
            examples: inputs of one run each, as `run` takes them.
            rounds: of each run.
            progress: True: a bar on stderr; or what to call with how much is done.

        Returns:
            What each agent that reads anything has gained, by name.

        Raises:
            InvalidRequest: there are no examples, one is no mapping, or the policy is exact. Nothing has run.
            TemplateError: an example's inputs are not what the placeholders ask for; names both. Nothing has run.
            PromptTooLong, UnknownAdapter, AgentFailed: as `run`.
            EngineClosed: the engine has been closed, before or meanwhile.
        """
        from kvcomm.agents.learning import warm
        from kvcomm.engine.warming import require_something, told

        plans = [self._plan_example(number, each, rounds) for number, each in enumerate(examples, start=1)]
        self._engine.require_open()
        require_something(self._engine.reuse, self.policy, len(plans))
        with told(progress) as tell:
            return warm(plans, self.policy, tell)

    @overload
    def status(self, agent: None = None) -> dict[str, ReaderStatus]: ...

    @overload
    def status(self, agent: str) -> ReaderStatus: ...

    def status(self, agent: str | None = None) -> ReaderStatus | dict[str, ReaderStatus]:
        """What an agent has, and what is missing until its text is moved, under the group's policy, in numbers.

        Args:
            agent: its name; None: every agent that reads anything, by name.

        Raises:
            InvalidRequest: there is no such agent, or it reads nothing.
        """
        known = {each.name: each for each in self.agents}
        if agent is None:
            return {name: self._status(each) for name, each in known.items() if each.slots}
        if agent not in known:
            raise InvalidRequest(f"the group has no agent {agent!r}; it has {', '.join(known) or 'none'}")
        if not known[agent].slots:
            raise InvalidRequest(f"agent {agent!r} has no placeholder: it reads nothing that could be moved")
        return self._status(known[agent])

    def _status(self, agent: Agent) -> ReaderStatus:
        prompt = self._renderer.render(agent).fill({})
        return self._engine.reuse.status(prompt, policy=self.policy, tenant=self._tenant, adapter=agent.adapter)

    def close(self) -> None:
        """Close the engine if the group made it; an engine that was given stays open."""
        if self._owns_engine:
            self._engine.close()

    def __enter__(self) -> KVCommAgentGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _plan_example(self, number: int, inputs: object, rounds: int) -> RunPlan:
        """The plan of an example's run; errors say which example it is."""
        if not isinstance(inputs, Mapping):
            raise InvalidRequest(f"example {number} must be a mapping of inputs to texts, not {told_of(inputs)}")
        try:
            return self._plan(rounds, dict(inputs))
        except (TemplateError, PromptTooLong) as error:
            raise type(error)(f"example {number}: {error}") from error

    def _plan(self, rounds: object, inputs: dict[str, Input]) -> RunPlan:
        if not isinstance(rounds, int) or rounds < 1:
            raise InvalidRequest(f"rounds must be a whole number >= 1, got {rounds!r}")
        self._graph.check_inputs(inputs)
        plan = RunPlan(
            engine=self._engine,
            renderer=self._renderer,
            graph=self._graph,
            prompts={agent.name: self._renderer.render(agent) for agent in self._graph.agents},
            inputs={name: self._renderer.read_input(name, value) for name, value in inputs.items()},
            num_rounds=rounds,
            sampling=self._sampling,
            tenant=self._tenant,
            policy=self.policy,
            read_along=self._read_along,
        )
        plan.check_adapters()
        plan.check_grammars()
        plan.check_lengths()
        return plan


def _as_engine(
    given: Engine | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, policy: ReusePolicy | None
) -> tuple[Engine, bool]:
    """An engine, and whether it was made here."""
    if hasattr(given, "submit"):
        if tokenizer is not None:
            raise InvalidRequest("an Engine brings its own tokenizer; leave the tokenizer out")
        return cast("Engine", given), False
    if tokenizer is None:
        raise InvalidRequest(
            f"got {type(given).__name__} without a tokenizer; give an Engine, or a model and its tokenizer"
        )
    from kvcomm.engine.engine import Engine

    return Engine(cast("PreTrainedModel", given), tokenizer, policy=policy), True
